// Products of matrices of floats on the tile unit of a processor that has one (AMX-BF16): as exact as those of the
// vector unit, and more than twice as fast. A float is the sum of three bfloat16 numbers of eight bits each; of the nine
// products of two such sums the six that reach the 24th bit are taken, each exact, and added in float32. (For GPUs cuBLAS
// does the same with all nine.) Infinities do not split, and the unit takes numbers near the smallest for zero: `Extent`
// tells.
//
// A tile holds 16 rows of 16 pairs of bfloat16. A pair is that of columns, or rows, i and i + 16 of 32: two vectors go
// into one by a shift and an or, and the order of a sum is free.

#pragma once

#include "vector.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define TILES 0
#endif

constexpr long SIDE = 16;                    // rows of a tile
constexpr long PAIRED = 2 * SIDE;            // columns in it
constexpr int PIECES = 3;                    // of a number, or the first alone where all have no more
constexpr long PIECE = SIDE * SIDE;          // of 32 bits
constexpr long OPERAND = PIECES * PIECE;     // 16 rows of 32 columns, or their pairs turned

typedef uint32_t uvec __attribute__((vector_size(4 * W)));

// the greatest magnitude among numbers, as bits, those of infinities and NaN being the greatest of all; and all bits
struct Extent {
  ivec greatest = ivec{}, bits = ivec{};
  INLINE void see(vec x) {
    const ivec size = (ivec)x & INT32_MAX;
    greatest = size > greatest ? size : greatest;
    bits |= (ivec)x;
  }
  // whether all numbers are bfloat16 already
  bool whole() const {
    int32_t all = 0;
    for (int i = 0; i < W; ++i) all |= bits[i];
    return (all & 0xffff) == 0;
  }
  // whether the tile unit multiplies them as the vector unit does
  bool fits() const {
    int32_t most = 0;
    for (int i = 0; i < W; ++i) most = greatest[i] > most ? greatest[i] : most;
    float value;
    __builtin_memcpy(&value, &most, 4);
    return most == 0 || (1e-20f < value && value < 1e30f);
  }
};

// x as the sum of its pieces, the low sixteen bits of all but the last 0
static INLINE void split(vec x, ivec* piece) {
  piece[0] = ((ivec)x + 0x8000) & (int32_t)0xffff0000;
  const vec r = x - (vec)piece[0];
  piece[1] = ((ivec)r + 0x8000) & (int32_t)0xffff0000;
  piece[2] = (ivec)(r - (vec)piece[1]);
}

static INLINE void store_pairs(float* to, const ivec* low, const ivec* high) {
  UNROLL for (int p = 0; p < PIECES; ++p)
    store(to + p * PIECE, (vec)((ivec)((uvec)low[p] >> 16) | (high[p] & (int32_t)0xffff0000)));
}

#if TILES

// whether the system lets this process use tiles
static bool granted() {
  static const bool answer = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return answer;
}

// a thread's use of the tile unit, with whole tiles; it is left as it was found, for oneDNN's kernels use it, too
struct Tiles {
  alignas(64) uint8_t found[64];
  Tiles() {
    if (!granted()) return;
    asm volatile("sttilecfg %0" : "=m"(found));
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = SIDE;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() {
    if (!granted()) return;
    if (found[0])
      asm volatile("ldtilecfg %0" ::"m"(found));
    else
      asm volatile("tilerelease");
  }
};

#define TILE_LOAD(t, at, row) asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(at), "r"(4 * (row)) : "memory")
#define TILE_STORE(t, at, row) asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(at), "r"(4 * (row)) : "memory")
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define TILE_ADD(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// what of a, in tiles 2 and 3, and of b, in tile 4
#define LEFT(piece)                                    \
  TILE_LOAD(2, a + (piece) * PIECE, SIDE);             \
  if (R > 1) TILE_LOAD(3, a + ar + (piece) * PIECE, SIDE)
#define RIGHT(piece) TILE_LOAD(4, b + (piece) * PIECE, SIDE)
#define MULTIPLY                                       \
  TILE_ADD(0, 2, 4);                                   \
  if (R > 1) TILE_ADD(1, 3, 4)

// out (16 R x 16) (+)= the sum of the products of `steps` operands of a and of b, which lie one behind the other; those
// of the next rows of out `ar` further. A and B say whether all pieces of either count, or the first alone. Five tiles: what
// renames them is shared by the threads of a core, and beside a busy neighbour eight in use took three times as long.
template <int R, bool A, bool B>
static void tile_block(long steps, const float* a, long ar, const float* b, float* out, long row, bool add) {
  if (add) {
    TILE_LOAD(0, out, row);
    if (R > 1) TILE_LOAD(1, out + SIDE * row, row);
  } else {
    TILE_ZERO(0);
    if (R > 1) TILE_ZERO(1);
  }
  for (long t = 0; t < steps; ++t, a += OPERAND, b += OPERAND) {
    // of two neighbours each has one side that is loaded already; the smallest products first
    LEFT(0);
    if (B) {
      RIGHT(2);
      MULTIPLY;
      RIGHT(1);
      MULTIPLY;
    }
    RIGHT(0);
    MULTIPLY;
    if (A) {
      LEFT(2);
      MULTIPLY;
      LEFT(1);
      MULTIPLY;
    }
    if (A && B) {
      RIGHT(1);
      MULTIPLY;
    }
  }
  TILE_STORE(0, out, row);
  if (R > 1) TILE_STORE(1, out + SIDE * row, row);
}

#else

static bool granted() { return false; }
struct Tiles {};
template <int R, bool A, bool B>
static void tile_block(long, const float*, long, const float*, float*, long, bool) {}

#endif

// as `tile_block`, for any number of blocks of 16
template <bool A, bool B>
static void tile_blocks(long rows, long columns, long steps, const float* a, long ar, const float* b, long br, float* out,
                        long row, bool add) {
  for (long i = 0; i < rows; i += 2, a += 2 * ar, out += 2 * SIDE * row)
    for (long c = 0; c < columns; ++c)
      (i + 1 < rows ? tile_block<2, A, B> : tile_block<1, A, B>)(steps, a, ar, b + c * br, out + SIDE * c, row, add);
}

// operands one behind the other, the next 16 rows or columns `next` further; `whole` where the first piece is all
struct Operands {
  const float* data;
  long next;
  bool whole;
};

static void tile_gemm(long rows, long columns, long steps, Operands a, Operands b, float* out, long row, bool add) {
  (a.whole ? b.whole ? tile_blocks<false, false> : tile_blocks<false, true>
           : b.whole ? tile_blocks<true, false> : tile_blocks<true, true>)(rows, columns, steps, a.data, a.next, b.data,
                                                                          b.next, out, row, add);
}
