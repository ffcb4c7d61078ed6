// What the compiled products share: matrix products of a tile, packing, threads.
//
// Vector lanes are queries. A tile of KEYS keys by LANES queries goes through scores, features and
// products without leaving the level-1 cache; every product is one `gemm` with its sums in registers, so
// block sizes follow the number of registers, 32 but in AVX2: with those of the others it spills and is 26 x slower.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "vector.h"

#ifdef __AVX512F__
constexpr int ROWS = 12;    // rows of sums, two vectors each, of the 32 registers
constexpr int WIDE = 4;     // vectors of a row where rows are 64 long ..
constexpr int WIDE_ROWS = 6;
#elif defined(__aarch64__)
constexpr int ROWS = 10;    // of the 32 some hold several factors: a product takes one lane of a register
constexpr int WIDE = 4;
constexpr int WIDE_ROWS = 5;
#else
constexpr int ROWS = 6;
constexpr int WIDE = 2;
constexpr int WIDE_ROWS = 6;
#endif
constexpr int LANES = 2 * W;
constexpr int PANEL = (ROWS + W - 1) / W * W;  // ROWS in whole vectors

static long round_up(long x, long step) { return (x + step - 1) / step * step; }

// --- products --------------------------------------------------------------------------------------

// out[i][..] (+)= sum_t a[i * AI + t * at] * b[t * bt + ..] for R rows of V vectors, all sums in registers;
// where AI is 0, of rows that `ai` tells
template <int R, int V, int AI>
static inline __attribute__((always_inline)) void block(long steps, const float* a, long at, const float* b,
                                                         long bt, float* out, long row, bool add, long ai) {
  const long next = AI ? AI : ai;
  vec sum[R][V];
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = add ? load(out + i * row + v * W) : vec{};
  for (long t = 0; t < steps; ++t, a += at, b += bt) {
    vec x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 24
    for (int i = 0; i < R; ++i) {
      const vec s = splat(a[i * next]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += s * x[v];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + i * row + v * W, sum[i][v]);
}

template <int R, int V, int AI>
static __attribute__((noinline)) void rest(int rows, long steps, const float* a, long at, const float* b, long bt,
                                           float* out, long row, bool add, long ai) {
  if constexpr (R > 0) {
    if (rows == R)
      block<R, V, AI>(steps, a, at, b, bt, out, row, add, ai);
    else
      rest<R - 1, V, AI>(rows, steps, a, at, b, bt, out, row, add, ai);
  }
}

// any number of rows, in blocks of R
template <int R, int V, int AI>
static __attribute__((noinline)) void gemm(int rows, long steps, const float* a, long at, const float* b, long bt,
                                           float* out, long row, bool add, long ai = AI) {
  for (; rows >= R; rows -= R, a += R * ai, out += R * row)
    block<R, V, AI>(steps, a, at, b, bt, out, row, add, ai);
  if (rows) rest<R - 1, V, AI>(rows, steps, a, at, b, bt, out, row, add, ai);
}

// as `gemm`, for rows of `width` floats, a multiple of W
template <int R, int AI>
static void wide_gemm(int rows, long width, long steps, const float* a, long at, const float* b, long bt, float* out,
                      long row, bool add = true, long ai = AI) {
  long c = 0;
  for (; c + WIDE * W <= width; c += WIDE * W)
    gemm<R, WIDE, AI>(rows, steps, a, at, b + c, bt, out + c, row, add, ai);
  for (; c < width; c += W) gemm<ROWS, 1, AI>(rows, steps, a, at, b + c, bt, out + c, row, add, ai);
}

// --- packing ---------------------------------------------------------------------------------------

struct Strided {
  const float* data;
  int64_t b, h, n, d;
  const float* at(long i, long j) const { return data + i * b + j * h; }
};

// where rows of a result go, each one piece of memory
struct Room {
  float* data;
  int64_t b, h, n, d;
  float* at(long i, long j) const { return data + i * b + j * h; }
};

struct Coefs {
  const float* data;
  int64_t b, h, p, m, j;
};

struct Mask {
  const uint8_t* data;  // null: none
  int64_t b, h, n, m;
};

struct Shape {
  int64_t batch, heads, queries, keys, width, rank, value_width;
};

struct Buffer {
  float* data = nullptr;
  long size = 0;
  explicit Buffer(long floats) { need(floats); }
  // room for so many; what was there is lost if there was less
  void need(long floats) {
    if (data && floats <= size) return;
    std::free(data);
    data = static_cast<float*>(std::aligned_alloc(64, round_up(4 * std::max(floats, 1L), 64)));
    if (!data) throw std::bad_alloc();
    size = floats;
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  operator float*() const { return data; }
};

// `count` rows of x, times scale, as rows of `width` floats; zero in the columns beyond d and the rows up to `total`
static void pack_rows(const float* x, int64_t sn, int64_t sd, long count, long total, long d, long width, float scale,
                      float* out) {
  for (long i = 0; i < count; ++i, x += sn, out += width) {
    // rows lie far apart: the hardware sees no stream
    for (long c = 0; c < d; c += 16) __builtin_prefetch(x + 4 * sn + c * sd);
    if (sd == 1)
      for (long c = 0; c < d; ++c) out[c] = x[c] * scale;
    else
      for (long c = 0; c < d; ++c) out[c] = x[c * sd] * scale;
    std::fill(out + d, out + width, 0.0f);
  }
  std::fill(out, out + (total - count) * width, 0.0f);
}

// sum_c a[c] b[c * step]
static float dot(const float* a, const float* b, int64_t step, long count) {
  float sum = 0;
  long c = 0;
  if (step == 1) {
    vec part = vec{};
    for (; c + W <= count; c += W) part += load(a + c) * load(b + c);
    for (int i = 0; i < W; ++i) sum += part[i];
  }
  for (; c < count; ++c) sum += a[c] * b[c * step];
  return sum;
}

// swaps the blocks of S x S off the diagonal of every block of 2S x 2S; L counts lanes
template <int S, int... L>
static INLINE void transpose_blocks(vec (&x)[W], std::integer_sequence<int, L...>) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) {
      const vec a = x[i], b = x[i + S];
      x[i] = pick<(L & S ? W + L - S : L)...>(a, b);
      x[i + S] = pick<(L & S ? W + L : L + S)...>(a, b);
    }
}

// W rows and W columns of `in` to columns of `out`
static void transpose(const float* in, long row, float* out, long column) {
  vec x[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load(in + i * row);
  const std::make_integer_sequence<int, W> lanes;
  if constexpr (W > 8) transpose_blocks<8>(x, lanes);
  if constexpr (W > 4) transpose_blocks<4>(x, lanes);
  transpose_blocks<2>(x, lanes);
  transpose_blocks<1>(x, lanes);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(out + i * column, x[i]);
}

// `rows` x `columns` of `in` to columns of `out`
static void transpose_matrix(const float* in, long row, long rows, long columns, float* out, long column) {
  const long whole_rows = rows / W * W, whole = columns / W * W;
  for (long c = 0; c < whole; c += W)
    for (long r = 0; r < whole_rows; r += W) transpose(in + r * row + c, row, out + c * column + r, column);
  for (long r = 0; r < rows; ++r)
    for (long c = r < whole_rows ? whole : 0; c < columns; ++c) out[c * column + r] = in[r * row + c];
}

// packed rows of LANES queries as columns of lanes
static void pack_lanes(const float* rows, long width, float* out) {
  for (long c = 0; c < width; c += W)
    for (long i = 0; i < LANES; i += W) transpose(rows + i * width + c, width, out + c * LANES + i, LANES);
}

// packed rows of keys in panels of ROWS keys: element c of a panel's keys side by side, PANEL apart from element c + 1;
// of rows beyond the last key PANEL are read
static void pack_panels(const float* rows, long width, long keys, float* out) {
  for (long m = 0; m < keys; m += ROWS, out += width * PANEL)
    for (long i = 0; i < PANEL; i += W)
      for (long c = 0; c < width; c += W) transpose(rows + (m + i) * width + c, width, out + c * PANEL + i, PANEL);
}
static long panel_floats(long keys, long width) { return round_up(keys, ROWS) / ROWS * width * PANEL; }

// rows of LANES integers, -1 where x[row * row_step + lane * lane_step] is not 0
static void pack_mask(const uint8_t* x, int64_t row_step, int64_t lane_step, long rows, long lanes, int32_t* out) {
  for (long r = 0; r < rows; ++r, x += row_step, out += LANES)
    for (long l = 0; l < LANES; ++l) out[l] = l < lanes && x[l * lane_step] ? -1 : 0;
}

// --- all heads of all samples ----------------------------------------------------------------------

// Runs work(thread, begin, end) over parts of [0, count). Plain threads: an OpenMP runtime of our own would
// spin beside torch's.
template <class Work>
static void spread(long count, int threads, const Work& work) {
  std::atomic<bool> failed{false};
  const auto part = [&](int t) {
    try {
      work(t, count * t / threads, count * (t + 1) / threads);
    } catch (const std::bad_alloc&) {  // which would end the process if it left a thread
      failed = true;
    }
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  for (int t = 1; t < threads; ++t) {
    try {
      others.emplace_back(part, t);
    } catch (const std::system_error&) {
      part(t);  // the system gives no more threads
    }
  }
  part(0);
  for (auto& other : others) other.join();
  if (failed) throw std::bad_alloc();
}

// Samples whose coefficients differ count as heads: then `batch` samples share those of each of `heads`.
struct Order {
  long batch, heads, real_heads;
  Order(const Shape& s, bool own)
      : batch(own ? 1 : s.batch), heads(own ? s.batch * s.heads : s.heads), real_heads(s.heads) {}
  long count() const { return batch * heads; }
  long head(long task) const { return task / batch; }
  long b(long task) const { return batch == 1 ? head(task) / real_heads : task % batch; }
  long h(long task) const { return head(task) % real_heads; }
};

static const float* coefs_at(const Coefs& c, const Order& order, long task) {
  return c.data + (order.batch == 1 ? order.b(task) * c.b : 0) + order.h(task) * c.h;
}

// A thread sums the gradient of the coefficients of each head it meets in a slot of its own; slots are added
// in the order of the threads, so that a number of threads always gives the same result.
struct Slots {
  std::vector<long> start, first, last;
  long count = 0;
  Slots(const Order& order, int threads) : start(threads), first(threads), last(threads) {
    for (int t = 0; t < threads; ++t) {
      const long begin = order.count() * t / threads, end = order.count() * (t + 1) / threads;
      start[t] = count;
      first[t] = order.head(begin);
      last[t] = end > begin ? order.head(end - 1) : first[t] - 1;
      count += last[t] - first[t] + 1;
    }
  }
  long slot(int thread, long head) const { return start[thread] + head - first[thread]; }
  // sums of each slot, `size` floats at sums + slot * size, into what add(head, sum, fresh) does with them
  template <class Add>
  void collect(const float* sums, long size, const Add& add) const {
    // there are no more threads than tasks, so every thread met a head
    for (size_t t = 0; t < start.size(); ++t)
      for (long head = first[t]; head <= last[t]; ++head)
        add(head, sums + slot(t, head) * size, t == 0 || last[t - 1] < head);
  }
};
