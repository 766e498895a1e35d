#pragma once

#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

// The tiles of AMX in memory, for csrc/cpu/amx_tiles.h: as Intel's manual defines them, and an
// end to the process where a processor would raise a fault or a thread ends with tiles still held.

namespace slimvit {
namespace {

class Tiles {
 public:
  template <class Config>
  static void configure(const Config& config) {
    static_assert(sizeof(Config) == 64, "what ldtilecfg reads");
    require(config.palette == 1 && config.start_row == 0, "palette 1 from row 0");
    for (int i = 0; i < 8; ++i) {
      require(config.rows[i] <= 16 && config.bytes[i] <= 64, "16 rows of 64 bytes");
      require((config.rows[i] == 0) == (config.bytes[i] == 0), "rows and bytes, or neither");
      tiles()[i] = {config.rows[i], config.bytes[i], {}};
    }
  }
  static void release() {
    for (int i = 0; i < 8; ++i) tiles()[i] = {};
  }

  template <int kTile>
  static void zero() {
    std::memset(used(kTile).data, 0, sizeof(Tile::data));
  }
  template <int kTile>
  static void load(const void* from, long row_bytes) {
    Tile& tile = used(kTile);
    std::memset(tile.data, 0, sizeof(tile.data));
    for (int i = 0; i < tile.rows; ++i)
      std::memcpy(tile.data[i], static_cast<const char*>(from) + i * row_bytes, tile.bytes);
  }
  template <int kTile>
  static void store(void* to, long row_bytes) {
    const Tile& tile = used(kTile);
    for (int i = 0; i < tile.rows; ++i)
      std::memcpy(static_cast<char*>(to) + i * row_bytes, tile.data[i], tile.bytes);
  }
  template <int kSum, int kA, int kB>
  static void dot() {
    Tile& sum = used(kSum);
    const Tile &a = used(kA), &b = used(kB);
    require(sum.rows == a.rows && sum.bytes == b.bytes && a.bytes == 4 * b.rows,
            "tdpbf16ps: shapes that go together");
    const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const auto low_of = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
    const auto high_of = [&](__m512i x) {
      return _mm512_castsi512_ps(_mm512_and_si512(x, high_half));
    };
    for (int i = 0; i < sum.rows; ++i) {
      __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
      for (int k = 0; k < b.rows; ++k) {  // products are exact
        int pair;
        std::memcpy(&pair, a.data[i] + 4 * k, sizeof(pair));
        const __m512i x = _mm512_set1_epi32(pair), y = _mm512_load_si512(b.data[k]);
        low = _mm512_fmadd_ps(low_of(x), low_of(y), low);
        high = _mm512_fmadd_ps(high_of(x), high_of(y), high);
      }
      const __m512 before = _mm512_load_ps(sum.data[i]);
      _mm512_store_ps(sum.data[i], _mm512_add_ps(before, _mm512_add_ps(low, high)));
    }
  }

 private:
  struct Tile {
    int rows = 0, bytes = 0;
    alignas(64) char data[16][64] = {};
  };

  struct Held {
    Tile tiles[8];
    ~Held() {
      for (const Tile& tile : tiles)
        if (tile.rows != 0) fail("at the end of a thread", "its tiles released");
    }
  };

  static Tile* tiles() {
    static thread_local Held held;
    return held.tiles;
  }
  static Tile& used(int i) {
    require(tiles()[i].rows > 0, "a tile that is configured");
    return tiles()[i];
  }
  static void require(bool holds, const char* what) {
    if (!holds) fail("AMX would fault", what);
  }
  [[noreturn]] static void fail(const char* where, const char* what) {
    std::fprintf(stderr, "%s: wanted %s\n", where, what);
    std::abort();
  }
};

}  // namespace
}  // namespace slimvit
