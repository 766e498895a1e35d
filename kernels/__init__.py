"""Triton kernels of slimvit, installed as `slimvit.kernels`. They import torch and triton only."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is slimvit.kernels, found as `kernels` because slimvit's repository root is "
        "on sys.path: write `import slimvit.kernels`, or start Python in another folder to reach "
        "Hugging Face's package of that name"
    )
