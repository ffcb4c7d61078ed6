// The streamed product of the Fourier family in float32 on AVX-512 or AVX2, forward and backward:
//   y[n, p] = sum_m mask[n, m] sum_j f_j(scale q_n . k_m) C[p, m, j],  f = cos x .. cos Gx, sin x .. sin Gx.
// Built by kart/kernels/cpp.py with -DGRID=G; what it computes is held against kart/kernels/chunked.py.
//
// Vector lanes are queries. A tile of KEYS keys by QUERIES queries goes through scores, features and
// products without leaving the level-1 cache; every product is one `Gemm` with its sums in registers, so
// block sizes follow the number of registers: with those of AVX-512, AVX2 spills and is 26 x slower.
// No -ffast-math: it would delete the rounding by a magic number.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int W = 16;       // floats in a vector
constexpr int ROWS = 12;    // rows of sums, two vectors each, of the 32 registers
constexpr int WIDE = 4;     // vectors of a row where rows are 64 long ..
constexpr int WIDE_ROWS = 6;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8;
constexpr int ROWS = 6;
constexpr int WIDE = 2;
constexpr int WIDE_ROWS = 6;
#else
#error "needs AVX-512 (F, DQ) or AVX2 with FMA"
#endif

constexpr int G = GRID;
constexpr int K = 2 * G;
constexpr int QUERIES = 2 * W;
constexpr int KEYS = K <= 6 ? 2 * ROWS : ROWS;

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef float loose __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t iloose __attribute__((vector_size(4 * W), aligned(4), may_alias));

static inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
static inline void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }
static inline vec splat(float x) { return vec{} + x; }

static long round_up(long x, long step) { return (x + step - 1) / step * step; }

// --- products --------------------------------------------------------------------------------------

// out[i][..] (+)= sum_t a[i * AI + t * at] * b[t * bt + ..] for R rows of V vectors, all sums in registers
template <int R, int V, int AI>
static inline __attribute__((always_inline)) void block(long steps, const float* a, long at, const float* b,
                                                         long bt, float* out, long row, bool add) {
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
      const vec s = splat(a[i * AI]);
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
                                           float* out, long row, bool add) {
  if constexpr (R > 0) {
    if (rows == R)
      block<R, V, AI>(steps, a, at, b, bt, out, row, add);
    else
      rest<R - 1, V, AI>(rows, steps, a, at, b, bt, out, row, add);
  }
}

// any number of rows, in blocks of R
template <int R, int V, int AI>
static __attribute__((noinline)) void gemm(int rows, long steps, const float* a, long at, const float* b, long bt,
                                           float* out, long row, bool add) {
  for (; rows >= R; rows -= R, a += R * AI, out += R * row) block<R, V, AI>(steps, a, at, b, bt, out, row, add);
  if (rows) rest<R - 1, V, AI>(rows, steps, a, at, b, bt, out, row, add);
}

// as `gemm`, adding to rows of `width` floats, a multiple of W
template <int R, int AI>
static void wide_gemm(int rows, long width, long steps, const float* a, long at, const float* b, long bt, float* out,
                      long row) {
  long c = 0;
  for (; c + WIDE * W <= width; c += WIDE * W) gemm<R, WIDE, AI>(rows, steps, a, at, b + c, bt, out + c, row, true);
  for (; c < width; c += W) gemm<ROWS, 1, AI>(rows, steps, a, at, b + c, bt, out + c, row, true);
}

// --- features --------------------------------------------------------------------------------------

// Sine and cosine to 2 ulp of 1 for |x| < 2^22: whole quarter turns are taken off in three parts, each
// product exact in the fused multiply-add (Cody and Waite), then polynomials on [-pi/4, pi/4] (Cephes).
// Beyond, neighbouring floats are more than a radian apart: the remainder is held to one quarter turn, so
// that the result stays bounded.
static inline void sincos(vec x, vec& sine, vec& cosine) {
  const vec shifted = x * 0.63661977236758134f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const vec turns = shifted - 12582912.0f;
  const ivec quadrant = (ivec)shifted;  // its low bits count quarter turns
  vec r = x - turns * 1.57079637050628662f;
  r = r + turns * 4.37113900018624283e-8f;
  r = r + turns * 1.71512448e-15f;
  r = r > 0.8f ? vec{} + 0.8f : r;
  r = r < -0.8f ? vec{} - 0.8f : r;
  const vec z = r * r;
  const vec s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const vec c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
                0.5f * z + 1.0f;
  const ivec odd = (quadrant << 31) >> 31;
  const ivec sine_sign = (quadrant << 30) & INT32_MIN;
  const ivec cosine_sign = sine_sign ^ (odd & INT32_MIN);
  sine = (vec)((ivec)(odd ? c : s) ^ sine_sign);
  cosine = (vec)((ivec)(odd ? s : c) ^ cosine_sign);
}

// scores (keys x QUERIES) to features (keys * K x QUERIES); `mask`, where given, has -1 or 0 for each score
template <int V>
static void fill_features(int keys, const float* scores, const int32_t* mask, float* features) {
  for (int m = 0; m < keys; ++m, scores += QUERIES, features += K * QUERIES)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec c[G], s[G];
      sincos(load(scores + v * W), s[0], c[0]);
#pragma GCC unroll 8
      for (int k = 2; k <= G; ++k) {
        // angle sum of the two halves: the error grows like k
        const int i = k / 2 - 1, j = k - k / 2 - 1;
        c[k - 1] = c[i] * c[j] - s[i] * s[j];
        s[k - 1] = s[i] * c[j] + c[i] * s[j];
      }
      if (mask) {
        const ivec keep = *reinterpret_cast<const iloose*>(mask + m * QUERIES + v * W);
#pragma GCC unroll 8
        for (int k = 0; k < G; ++k) {
          c[k] = (vec)((ivec)c[k] & keep);
          s[k] = (vec)((ivec)s[k] & keep);
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < G; ++k) {
        store(features + k * QUERIES + v * W, c[k]);
        store(features + (G + k) * QUERIES + v * W, s[k]);
      }
    }
}

// --- score gradient --------------------------------------------------------------------------------

// ds[key] (+)= sum_j f[key][j] * (sum_p slopes[p][key, j] dy[p]) for N keys, J features of each
template <int N, int J, int V>
static inline __attribute__((always_inline)) void pull(int rank, const float* slopes, long step, const float* dy,
                                                        const float* features, float* ds, bool add) {
  vec sum[N * J][V];
#pragma GCC unroll 24
  for (int i = 0; i < N * J; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[i][v] = vec{};
  for (int p = 0; p < rank; ++p, slopes += step, dy += QUERIES) {
    vec x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) x[v] = load(dy + v * W);
#pragma GCC unroll 24
    for (int i = 0; i < N * J; ++i) {
      const vec s = splat(slopes[i]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] += s * x[v];
    }
  }
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec total = add ? load(ds + n * QUERIES + v * W) : vec{};
#pragma GCC unroll 24
      for (int j = 0; j < J; ++j) total += sum[n * J + j][v] * load(features + (n * J + j) * QUERIES + v * W);
      store(ds + n * QUERIES + v * W, total);
    }
}

// slopes are packed (key, p, j): for one key, all p follow each other with K features each
constexpr int GROUP = std::max(1, ROWS / K);  // keys whose features fill the registers

template <int V>
static void score_gradient(int keys, int rank, const float* slopes, const float* dy, const float* features, float* ds) {
  int m = 0;
  if constexpr (GROUP > 1)
    for (; m + GROUP <= keys; m += GROUP)
      pull<GROUP, K, V>(rank, slopes + (long)m * K * rank, GROUP * K, dy, features + m * K * QUERIES,
                        ds + m * QUERIES, false);
  for (; m < keys; ++m) {
    const float* key = slopes + (long)m * K * rank;
    const float* own = features + m * K * QUERIES;
    if constexpr (K <= ROWS) {
      pull<1, K, V>(rank, key, K, dy, own, ds + m * QUERIES, false);
    } else {
      int j = 0;
      for (; j + ROWS <= K; j += ROWS)
        pull<1, ROWS, V>(rank, key + j, K, dy, own + j * QUERIES, ds + m * QUERIES, j > 0);
      if constexpr (K % ROWS > 0)
        pull<1, K % ROWS, V>(rank, key + j, K, dy, own + j * QUERIES, ds + m * QUERIES, true);
    }
  }
}

// --- packing ---------------------------------------------------------------------------------------

struct Strided {
  const float* data;
  int64_t b, h, n, d;
  const float* at(long i, long j) const { return data + i * b + j * h; }
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
  int64_t batch, heads, queries, keys, width, rank;
};

struct Buffer {
  float* data = nullptr;
  explicit Buffer(long size) {
    data = static_cast<float*>(std::aligned_alloc(64, round_up(4 * std::max(size, 1L), 64)));
    if (!data) throw std::bad_alloc();
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

// swaps the blocks of S x S off the diagonal of every block of 2S x 2S
template <int S>
static inline __attribute__((always_inline)) void transpose_blocks(vec (&x)[W]) {
  ivec low, high;
  for (int l = 0; l < W; ++l) {
    low[l] = l & S ? W + l - S : l;
    high[l] = l & S ? W + l : l + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) {
      const vec a = x[i], b = x[i + S];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + S] = __builtin_shuffle(a, b, high);
    }
}

// W rows and W columns of `in` to columns of `out`
static void transpose(const float* in, long row, float* out, long column) {
  vec x[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load(in + i * row);
  if constexpr (W == 16) transpose_blocks<8>(x);
  transpose_blocks<4>(x);
  transpose_blocks<2>(x);
  transpose_blocks<1>(x);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(out + i * column, x[i]);
}

// packed rows of QUERIES queries as columns of lanes
static void pack_lanes(const float* rows, long width, float* out) {
  for (long c = 0; c < width; c += W)
    for (long i = 0; i < QUERIES; i += W) transpose(rows + i * width + c, width, out + c * QUERIES + i, QUERIES);
}

// packed rows of keys in panels of ROWS keys: element c of a panel's keys side by side, W apart from element c + 1
static void pack_panels(const float* rows, long width, long keys, float* out) {
  for (long m = 0; m < keys; m += ROWS, out += width * W)
    for (long c = 0; c < width; c += W) transpose(rows + m * width + c, width, out + c * W, W);
}

// C as (key, feature, p)
static void pack_coefs(const Coefs& c, const float* x, const Shape& s, float* out) {
  for (long m = 0; m < s.keys; ++m)
    for (long j = 0; j < K; ++j)
      for (long p = 0; p < s.rank; ++p) *out++ = x[p * c.p + m * c.m + j * c.j];
}

// coefficients of the derivative, whose features are those of the function: k b_k for cos kx, -k a_k for sin kx.
// Keys in groups of GROUP as `score_gradient` takes them: (group, p, key, feature), then single keys.
static void pack_slopes(const Coefs& c, const float* x, const Shape& s, float* out) {
  for (long first = 0; first < s.keys;) {
    const long count = s.keys - first >= GROUP ? GROUP : 1;
    for (long p = 0; p < s.rank; ++p)
      for (long m = first; m < first + count; ++m)
        for (long j = 0; j < K; ++j) {
          const float order = j < G ? j + 1 : -(j - G + 1);
          *out++ = order * x[p * c.p + m * c.m + (j < G ? j + G : j - G) * c.j];
        }
    first += count;
  }
}

static void pack_mask(const uint8_t* x, const Mask& mask, long keys, long queries, int32_t* out) {
  for (long m = 0; m < keys; ++m, out += QUERIES)
    for (long i = 0; i < QUERIES; ++i) out[i] = i < queries && x[i * mask.n + m * mask.m] ? -1 : 0;
}

// --- one head of one sample ------------------------------------------------------------------------

struct Scratch {
  long width, rank;  // padded to whole vectors
  Buffer panels, keys, query_lanes, query_rows, dy_lanes, dy_rows, scores, features, gradient, y, dq, dk;
  std::vector<int32_t> mask;
  Scratch(const Shape& s, bool backward)
      : width(round_up(s.width, W)),
        rank(round_up(s.rank, W)),
        panels(round_up(s.keys, ROWS) / ROWS * width * W),
        keys((s.keys + W) * width),  // a panel is read as W rows
        query_lanes(width * QUERIES),
        query_rows(QUERIES * width),
        dy_lanes(backward ? rank * QUERIES : 0),
        dy_rows(backward ? QUERIES * rank : 0),
        scores(KEYS * QUERIES),
        features(KEYS * K * QUERIES),
        gradient(KEYS * QUERIES),
        y(backward ? 0 : s.rank * QUERIES),
        dq(backward ? QUERIES * width : 0),
        dk(backward ? s.keys * width : 0),
        mask(KEYS * QUERIES) {}

  void take_keys(const float* x, int64_t sn, int64_t sd, const Shape& s) {
    pack_rows(x, sn, sd, s.keys, s.keys + W, s.width, width, 1.0f, keys);
    pack_panels(keys, width, s.keys, panels);
  }
  void take_queries(const float* x, int64_t sn, int64_t sd, long count, float scale, const Shape& s) {
    pack_rows(x, sn, sd, count, QUERIES, s.width, width, scale, query_rows);
    pack_lanes(query_rows, width, query_lanes);
  }
  void take_dy(const float* x, int64_t sn, int64_t sd, long count, const Shape& s) {
    pack_rows(x, sn, sd, count, QUERIES, s.rank, rank, 1.0f, dy_rows);
    pack_lanes(dy_rows, rank, dy_lanes);
  }
};

template <int V>
static void tile(const Shape& s, Scratch& w, long first, int keys, const uint8_t* mask_at, const Mask& mask,
                 long queries) {
  for (int m = 0; m < keys; m += ROWS)
    gemm<ROWS, V, 1>(std::min(ROWS, keys - m), s.width, w.panels + (first + m) / ROWS * w.width * W, W, w.query_lanes,
                     QUERIES, w.scores + m * QUERIES, QUERIES, false);
  if (mask.data) pack_mask(mask_at + first * mask.m, mask, keys, queries, w.mask.data());
  fill_features<V>(keys, w.scores, mask.data ? w.mask.data() : nullptr, w.features);
}

template <int V>
static void forward_block(const Shape& s, Scratch& w, const float* coefs, const uint8_t* mask_at, const Mask& mask,
                          long queries) {
  std::fill(w.y.data, w.y.data + s.rank * QUERIES, 0.0f);
  for (long first = 0; first < s.keys; first += KEYS) {
    const int keys = std::min<long>(KEYS, s.keys - first);
    tile<V>(s, w, first, keys, mask_at, mask, queries);
    gemm<ROWS, V, 1>(s.rank, (long)keys * K, coefs + first * K * s.rank, s.rank, w.features, QUERIES, w.y, QUERIES,
                     true);
  }
}

template <int V>
static void backward_block(const Shape& s, Scratch& w, const float* slopes, float* dcoefs, const uint8_t* mask_at,
                           const Mask& mask, long queries) {
  for (long first = 0; first < s.keys; first += KEYS) {
    const int keys = std::min<long>(KEYS, s.keys - first);
    tile<V>(s, w, first, keys, mask_at, mask, queries);
    score_gradient<V>(keys, s.rank, slopes + first * K * s.rank, w.dy_lanes, w.features, w.gradient);
    wide_gemm<WIDE_ROWS, QUERIES>(keys * K, w.rank, queries, w.features, 1, w.dy_rows, w.rank,
                                  dcoefs + first * K * w.rank, w.rank);
    wide_gemm<WIDE_ROWS, QUERIES>(keys, w.width, queries, w.gradient, 1, w.query_rows, w.width, w.dk + first * w.width,
                                  w.width);
    wide_gemm<4, 1>(queries, w.width, keys, w.gradient, QUERIES, w.keys + first * w.width, w.width, w.dq, w.width);
  }
}

// --- all heads of all samples ----------------------------------------------------------------------

// Runs work(thread, begin, end) over parts of [0, count). Plain threads: an OpenMP runtime of our own would
// spin beside torch's.
template <class Work>
static void spread(long count, int threads, const Work& work) {
  std::vector<std::thread> others;
  others.reserve(threads);
  for (int t = 1; t < threads; ++t) {
    const auto part = [&work, t, count, threads] { work(t, count * t / threads, count * (t + 1) / threads); };
    try {
      others.emplace_back(part);
    } catch (const std::system_error&) {
      part();  // the system gives no more threads
    }
  }
  work(0, 0, count / threads);
  for (auto& other : others) other.join();
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

extern "C" {

int kart_lanes() { return W; }

// y is contiguous (batch, heads, queries, rank); returns 0, or 1 without memory
int kart_forward(const Shape* shape, const Strided* q, const Strided* k, const Coefs* coefs, int own, const Mask* mask,
                 float scale, float* y, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  std::atomic<bool> failed{false};
  spread(order.count(), threads, [&](int, long begin, long end) {
    try {
      Scratch w(s, false);
      Buffer packed(s.keys * K * s.rank);
      long head = -1;
      for (long task = begin; task < end; ++task) {
        const long b = order.b(task), h = order.h(task);
        if (order.head(task) != head) {
          head = order.head(task);
          pack_coefs(*coefs, coefs_at(*coefs, order, task), s, packed);
        }
        w.take_keys(k->at(b, h), k->n, k->d, s);
        for (long n = 0; n < s.queries; n += QUERIES) {
          const long queries = std::min<long>(QUERIES, s.queries - n);
          w.take_queries(q->at(b, h) + n * q->n, q->n, q->d, queries, scale, s);
          const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
          if (queries > W)
            forward_block<2>(s, w, packed, mask_at, *mask, queries);
          else
            forward_block<1>(s, w, packed, mask_at, *mask, queries);
          float* out = y + ((b * s.heads + h) * s.queries + n) * s.rank;
          for (long i = 0; i < queries; ++i)
            for (long p = 0; p < s.rank; ++p) *out++ = w.y[p * QUERIES + i];
        }
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  return failed;
} catch (...) {
  return 1;
}

// dq, dk are contiguous like q and k; dcoefs is contiguous (samples with coefficients, heads, rank, keys, K)
int kart_backward(const Shape* shape, const Strided* dy, const Strided* q, const Strided* k, const Coefs* coefs,
                  int own, const Mask* mask, float scale, float* dq, float* dk, float* dcoefs, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const long rank = round_up(s.rank, W), rows = s.keys * K;
  // a thread sums the gradient of the coefficients of each head it meets in a slot of its own; slots
  // are added in the order of the threads, so that a number of threads always gives the same result
  std::vector<long> slot(threads), first(threads), last(threads);
  long slots = 0;
  for (int t = 0; t < threads; ++t) {
    const long begin = order.count() * t / threads, end = order.count() * (t + 1) / threads;
    slot[t] = slots;
    first[t] = order.head(begin);
    last[t] = end > begin ? order.head(end - 1) : first[t] - 1;
    slots += last[t] - first[t] + 1;
  }
  Buffer sums(slots * rows * rank);
  std::atomic<bool> failed{false};
  spread(order.count(), threads, [&](int thread, long begin, long end) {
    try {
      Scratch w(s, true);
      Buffer slopes(rows * s.rank);
      long head = -1;
      float* sum = nullptr;
      for (long task = begin; task < end; ++task) {
        const long b = order.b(task), h = order.h(task);
        if (order.head(task) != head) {
          head = order.head(task);
          pack_slopes(*coefs, coefs_at(*coefs, order, task), s, slopes);
          sum = sums + (slot[thread] + head - first[thread]) * rows * rank;
          std::fill(sum, sum + rows * rank, 0.0f);
        }
        w.take_keys(k->at(b, h), k->n, k->d, s);
        std::fill(w.dk.data, w.dk.data + s.keys * w.width, 0.0f);
        for (long n = 0; n < s.queries; n += QUERIES) {
          const long queries = std::min<long>(QUERIES, s.queries - n);
          w.take_queries(q->at(b, h) + n * q->n, q->n, q->d, queries, scale, s);
          w.take_dy(dy->at(b, h) + n * dy->n, dy->n, dy->d, queries, s);
          std::fill(w.dq.data, w.dq.data + queries * w.width, 0.0f);
          const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
          if (queries > W)
            backward_block<2>(s, w, slopes, sum, mask_at, *mask, queries);
          else
            backward_block<1>(s, w, slopes, sum, mask_at, *mask, queries);
          float* out = dq + ((b * s.heads + h) * s.queries + n) * s.width;
          for (long i = 0; i < queries; ++i)
            for (long c = 0; c < s.width; ++c) *out++ = scale * w.dq[i * w.width + c];
        }
        float* out = dk + (b * s.heads + h) * s.keys * s.width;
        for (long m = 0; m < s.keys; ++m, out += s.width) std::memcpy(out, w.dk + m * w.width, 4 * s.width);
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) return 1;
  // `threads` is at most the number of tasks, so every thread met a head
  for (int t = 0; t < threads; ++t)
    for (long head = first[t]; head <= last[t]; ++head) {
      const float* sum = sums + (slot[t] + head - first[t]) * rows * rank;
      float* out = dcoefs + head * s.rank * rows;
      const bool fresh = t == 0 || last[t - 1] < head;
      for (long p = 0; p < s.rank; ++p)
        for (long i = 0; i < rows; ++i) {
          float& x = out[p * rows + i];
          x = sum[i * rank + p] + (fresh ? 0.0f : x);
        }
    }
  return 0;
} catch (...) {
  return 1;
}

}  // extern "C"
