# Which devices the CUDA kernels are compiled for: CMAKE_CUDA_ARCHITECTURES, from
# TORCH_CUDA_ARCH_LIST as torch reads it, such as "8.0;9.0a+PTX", or else all that the compiler knows
# of those that have tensor cores. -real is machine code alone; the newest also carries PTX, for
# devices that come later. `native` would fail where there is no GPU.
string(REGEX MATCHALL "[^ ;,]+" wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
if(NOT wanted STREQUAL "")
  set(CMAKE_CUDA_ARCHITECTURES "")
  foreach(arch IN LISTS wanted)
    if(NOT arch MATCHES "^([0-9]+)\\.([0-9]+[af]?)(\\+PTX)?$")
      message(FATAL_ERROR
        "TORCH_CUDA_ARCH_LIST must be a list of versions such as 8.0;9.0+PTX, got '${arch}'")
    endif()
    if(CMAKE_MATCH_1 LESS 7)  # lists that were made for torch have these
      message(STATUS "No kernels for ${arch}: it has no tensor cores")
      continue()
    endif()
    string(APPEND CMAKE_MATCH_1 "${CMAKE_MATCH_2}")
    if(NOT CMAKE_MATCH_3)
      string(APPEND CMAKE_MATCH_1 "-real")
    endif()
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${CMAKE_MATCH_1})
  endforeach()
  if(CMAKE_CUDA_ARCHITECTURES STREQUAL "")
    message(FATAL_ERROR
      "TORCH_CUDA_ARCH_LIST must name a device from 7.0 on, got '$ENV{TORCH_CUDA_ARCH_LIST}'")
  endif()
elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90-real 100-real 120)
elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  set(CMAKE_CUDA_ARCHITECTURES 70-real 75-real 80-real 86-real 89-real 90-real 100-real 120)
else()
  set(CMAKE_CUDA_ARCHITECTURES 70-real 75-real 80-real 86-real 89-real 90)
endif()
message(STATUS "CUDA architectures: ${CMAKE_CUDA_ARCHITECTURES}")
