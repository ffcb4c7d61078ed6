// The streamed product of a linear family in float32, forward and backward:
//   y[n, p] = sum_m mask[n, m] sum_j f_j(scale q_n . k_m) C[p, m, j],
// and, where SOFTMAX is 1, from the same scores softmax(scale q k^T) v. kart/kernels/cpp/build.py puts the
// family's `struct Piece` and the constants BASE and SOFTMAX before this file; what it computes is held
// against kart/kernels/chunked.py.

#include "tile.h"

// --- features --------------------------------------------------------------------------------------

// the family's features, then the base activation: 0 none, 1 identity, 2 SiLU, 3 GELU
struct Features : Piece {
  static constexpr int K = Piece::K + (BASE > 0);
  using Piece::Piece;
  INLINE void features(vec x, vec* f) const {
    Piece::features(x, f);
    vec density;
    if constexpr (BASE == 1) f[K - 1] = x;
    if constexpr (BASE == 2) f[K - 1] = x * sigmoid(x);
    if constexpr (BASE == 3) f[K - 1] = x * normal(x, density);
  }
  INLINE void slopes(vec x, const vec* f, vec* g) const {
    Piece::slopes(x, f, g);
    if constexpr (BASE == 1) g[K - 1] = splat(1.0f);
    if constexpr (BASE == 2) {
      const vec s = sigmoid(x);
      g[K - 1] = s + f[K - 1] * (1.0f - s);
    }
    if constexpr (BASE == 3) {
      vec density;
      const vec share = normal(x, density);
      g[K - 1] = share + x * density;
    }
  }
};

constexpr int K = Features::K;
constexpr int KEYS = K <= 6 ? 2 * ROWS : ROWS;

// scores (keys x QUERIES) to features (keys * K x QUERIES); `mask`, where given, has -1 or 0 for each score
template <int V>
static void fill_features(const Features& family, int keys, const float* scores, const int32_t* mask,
                          float* features) {
  for (int m = 0; m < keys; ++m, scores += QUERIES, features += K * QUERIES)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec f[K];
      family.features(load(scores + v * W), f);
      if (mask) {
        const ivec kept = *reinterpret_cast<const iloose*>(mask + m * QUERIES + v * W);
        UNROLL for (int j = 0; j < K; ++j) f[j] = keep(f[j], kept);
      }
      UNROLL for (int j = 0; j < K; ++j) store(features + j * QUERIES + v * W, f[j]);
    }
}

// --- score gradient --------------------------------------------------------------------------------

// ds[key] (+)= sum_j g[key][j] * (sum_p C[p][key, j] dy[p]) for N keys, features FIRST to FIRST + J of each
template <int N, int FIRST, int J, int V>
static INLINE void pull(const Features& family, int rank, const float* coefs, long step, const float* dy,
                        const float* scores, const int32_t* mask, const float* features, float* ds) {
  vec sum[N * J][V];
#pragma GCC unroll 24
  for (int i = 0; i < N * J; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[i][v] = vec{};
  for (int p = 0; p < rank; ++p, coefs += step, dy += QUERIES) {
    vec x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) x[v] = load(dy + v * W);
#pragma GCC unroll 24
    for (int i = 0; i < N * J; ++i) {
      const vec s = splat(coefs[i]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] += s * x[v];
    }
  }
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec f[K], g[K];
      UNROLL for (int j = 0; j < K; ++j) f[j] = load(features + (n * K + j) * QUERIES + v * W);
      family.slopes(load(scores + n * QUERIES + v * W), f, g);
      vec total = FIRST > 0 ? load(ds + n * QUERIES + v * W) : vec{};
      UNROLL for (int j = 0; j < J; ++j) total += sum[n * J + j][v] * g[FIRST + j];
      if (mask) total = keep(total, *reinterpret_cast<const iloose*>(mask + n * QUERIES + v * W));
      store(ds + n * QUERIES + v * W, total);
    }
}

// for one key, FIRST on: as many features at a time as fill the registers
template <int FIRST, int V>
static INLINE void pull_key(const Features& family, int rank, const float* coefs, const float* dy,
                            const float* scores, const int32_t* mask, const float* features, float* ds) {
  if constexpr (FIRST < K) {
    constexpr int J = std::min(ROWS, K - FIRST);
    pull<1, FIRST, J, V>(family, rank, coefs + FIRST, K, dy, scores, mask, features, ds);
    pull_key<FIRST + J, V>(family, rank, coefs, dy, scores, mask, features, ds);
  }
}

constexpr int GROUP = std::max(1, ROWS / K);  // keys whose features fill the registers

// coefficients are packed as `pack_groups` has them
template <int V>
static void score_gradient(const Features& family, int keys, int rank, const float* coefs, const float* dy,
                           const float* scores, const int32_t* mask, const float* features, float* ds) {
  for (int m = 0; m < keys;) {
    const int count = keys - m >= GROUP ? GROUP : 1;
    const int32_t* kept = mask ? mask + m * QUERIES : nullptr;
    const float *c = coefs + (long)m * K * rank, *x = scores + m * QUERIES, *f = features + m * K * QUERIES;
    if constexpr (GROUP > 1)
      if (count == GROUP) {
        pull<GROUP, 0, K, V>(family, rank, c, GROUP * K, dy, x, kept, f, ds + m * QUERIES);
        m += GROUP;
        continue;
      }
    pull_key<0, V>(family, rank, c, dy, x, kept, f, ds + m * QUERIES);
    ++m;
  }
}

// C as (key, feature, p)
static void pack_coefs(const Coefs& c, const float* x, const Shape& s, float* out) {
  if (c.j == 1 && c.m == K) return transpose_matrix(x, c.p, s.rank, s.keys * K, out, s.rank);
  for (long m = 0; m < s.keys; ++m)
    for (long j = 0; j < K; ++j)
      for (long p = 0; p < s.rank; ++p) *out++ = x[p * c.p + m * c.m + j * c.j];
}

// C in groups of GROUP keys, (group, p, key, feature), then single keys: the tiles begin at multiples of GROUP
static void pack_groups(const Coefs& c, const float* x, const Shape& s, float* out) {
  for (long first = 0; first < s.keys;) {
    // a tile ends at a multiple of KEYS, and so does its last group
    const long left = std::min<long>(s.keys, first / KEYS * KEYS + KEYS) - first;
    const long count = left >= GROUP ? GROUP : 1;
    for (long p = 0; p < s.rank; ++p)
      for (long m = first; m < first + count; ++m)
        for (long j = 0; j < K; ++j) *out++ = x[p * c.p + m * c.m + j * c.j];
    first += count;
  }
}

// --- one head of one sample ------------------------------------------------------------------------

struct Scratch {
  long width, rank, value_width;  // padded to whole vectors
  Buffer panels, keys, query_lanes, query_rows, dy_lanes, dy_rows, scores, features, gradient, y, dq, dk;
  Buffer value_rows, value_panels, weights, out, out_rows, dv, statistics;
  std::vector<int32_t> mask;
  Scratch(const Shape& s, bool backward)
      : width(round_up(s.width, W)),
        rank(round_up(s.rank, W)),
        value_width(SOFTMAX ? round_up(s.value_width, W) : 0),
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
        value_rows((s.keys + W) * value_width),
        value_panels(backward ? round_up(s.keys, ROWS) / ROWS * value_width * W : 0),
        weights(SOFTMAX ? (backward ? KEYS : round_up(s.keys, KEYS)) * QUERIES : 0),
        out(value_width * QUERIES),
        out_rows(QUERIES * value_width),
        dv(backward ? s.keys * value_width : 0),
        statistics(2 * QUERIES),
        mask(KEYS * QUERIES) {}

  void take_keys(const Strided& k, const float* x, const Shape& s) {
    pack_rows(x, k.n, k.d, s.keys, s.keys + W, s.width, width, 1.0f, keys);
    pack_panels(keys, width, s.keys, panels);
  }
  void take_values(const Strided& v, const float* x, const Shape& s, bool backward) {
    pack_rows(x, v.n, v.d, s.keys, s.keys + W, s.value_width, value_width, 1.0f, value_rows);
    if (backward) pack_panels(value_rows, value_width, s.keys, value_panels);
  }
  void take_queries(const Strided& q, const float* x, long count, float scale, const Shape& s) {
    pack_rows(x, q.n, q.d, count, QUERIES, s.width, width, scale, query_rows);
    pack_lanes(query_rows, width, query_lanes);
  }
};

template <int V>
static void tile(const Features& family, const Shape& s, Scratch& w, long first, int keys, const uint8_t* mask_at,
                 const Mask& mask, long queries) {
  for (int m = 0; m < keys; m += ROWS)
    gemm<ROWS, V, 1>(std::min(ROWS, keys - m), s.width, w.panels + (first + m) / ROWS * w.width * W, W, w.query_lanes,
                     QUERIES, w.scores + m * QUERIES, QUERIES, false);
  if (mask.data) pack_mask(mask_at + first * mask.m, mask, keys, queries, w.mask.data());
  fill_features<V>(family, keys, w.scores, mask.data ? w.mask.data() : nullptr, w.features);
}

// the scores of a tile in place of hidden ones -inf, and their greatest so far
template <int V>
static void take_weights(int keys, const float* scores, const int32_t* mask, float* weights, vec* greatest) {
  for (int m = 0; m < keys; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec x = load(scores + m * QUERIES + v * W);
      if (mask) x = *reinterpret_cast<const iloose*>(mask + m * QUERIES + v * W) ? x : splat(-INFINITY);
      greatest[v] = clamp_above(greatest[v], x);
      store(weights + m * QUERIES + v * W, x);
    }
}

template <int V>
static void forward_block(const Features& family, const Shape& s, Scratch& w, const float* coefs,
                          const uint8_t* mask_at, const Mask& mask, long queries) {
  std::fill(w.y.data, w.y.data + s.rank * QUERIES, 0.0f);
  vec greatest[2] = {splat(-INFINITY), splat(-INFINITY)};
  for (long first = 0; first < s.keys; first += KEYS) {
    const int keys = std::min<long>(KEYS, s.keys - first);
    tile<V>(family, s, w, first, keys, mask_at, mask, queries);
    gemm<ROWS, V, 1>(s.rank, (long)keys * K, coefs + first * K * s.rank, s.rank, w.features, QUERIES, w.y, QUERIES,
                     true);
    if constexpr (SOFTMAX)
      take_weights<V>(keys, w.scores, mask.data ? w.mask.data() : nullptr, w.weights + first * QUERIES, greatest);
  }
  if constexpr (SOFTMAX) {
    vec total[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      // a query without keys: its weights are e^-inf whatever is taken away
      greatest[v] = greatest[v] > -INFINITY ? greatest[v] : vec{};
      total[v] = vec{};
    }
    for (long m = 0; m < s.keys; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* at = w.weights + m * QUERIES + v * W;
        const vec e = exponential(load(at) - greatest[v]);
        total[v] += e;
        store(at, e);
      }
    gemm<ROWS, V, 1>(s.value_width, s.keys, w.value_rows, w.value_width, w.weights, QUERIES, w.out, QUERIES, false);
    for (int v = 0; v < V; ++v) {
      store(w.statistics + v * W, total[v]);
      store(w.statistics + QUERIES + v * W, greatest[v]);
    }
  }
}

template <int V>
static void backward_block(const Features& family, const Shape& s, Scratch& w, const float* groups, float* dcoefs,
                           const uint8_t* mask_at, const Mask& mask, long queries) {
  for (long first = 0; first < s.keys; first += KEYS) {
    const int keys = std::min<long>(KEYS, s.keys - first);
    const int32_t* kept = mask.data ? w.mask.data() : nullptr;
    tile<V>(family, s, w, first, keys, mask_at, mask, queries);
    score_gradient<V>(family, keys, s.rank, groups + first * K * s.rank, w.dy_lanes, w.scores, kept, w.features,
                      w.gradient);
    wide_gemm<WIDE_ROWS, QUERIES>(keys * K, w.rank, queries, w.features, 1, w.dy_rows, w.rank,
                                  dcoefs + first * K * w.rank, w.rank);
    if constexpr (SOFTMAX) {
      // the features have been used: their room is for dL/dweights
      for (int m = 0; m < keys; m += ROWS)
        gemm<ROWS, V, 1>(std::min(ROWS, keys - m), s.value_width,
                         w.value_panels + (first + m) / ROWS * w.value_width * W, W, w.out, QUERIES,
                         w.features + m * QUERIES, QUERIES, false);
      for (int m = 0; m < keys; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const long at = m * QUERIES + v * W;
          vec p = exponential(load(w.scores + at) - load(w.statistics + v * W));
          if (kept) p = keep(p, *reinterpret_cast<const iloose*>(kept + at));
          store(w.weights + at, p);
          const vec pulled = load(w.features + at) - load(w.statistics + QUERIES + v * W);
          store(w.gradient + at, load(w.gradient + at) + p * pulled);
        }
      wide_gemm<WIDE_ROWS, QUERIES>(keys, w.value_width, queries, w.weights, 1, w.out_rows, w.value_width,
                                    w.dv + first * w.value_width, w.value_width);
    }
    wide_gemm<WIDE_ROWS, QUERIES>(keys, w.width, queries, w.gradient, 1, w.query_rows, w.width, w.dk + first * w.width,
                                  w.width);
    wide_gemm<4, 1>(queries, w.width, keys, w.gradient, QUERIES, w.keys + first * w.width, w.width, w.dq, w.width);
  }
}

// What softmax adds: its values, its output (batch, heads, queries, value_width) and the logarithm of its
// sums, contiguous; the gradients of the output and of the values.
struct Soft {
  Strided v, dout, out;
  float *result, *logsumexp, *dv;
};

extern "C" {

int kart_lanes() { return W; }

// y is contiguous (batch, heads, queries, rank); returns 0, or 1 without memory
int kart_forward(const Shape* shape, const float* options, const Strided* q, const Strided* k, const Coefs* coefs,
                 int own, const Mask* mask, float scale, const Soft* soft, float* y, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const Features family(options);
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
        w.take_keys(*k, k->at(b, h), s);
        if (SOFTMAX) w.take_values(soft->v, soft->v.at(b, h), s, false);
        for (long n = 0; n < s.queries; n += QUERIES) {
          const long queries = std::min<long>(QUERIES, s.queries - n);
          w.take_queries(*q, q->at(b, h) + n * q->n, queries, scale, s);
          const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
          if (queries > W)
            forward_block<2>(family, s, w, packed, mask_at, *mask, queries);
          else
            forward_block<1>(family, s, w, packed, mask_at, *mask, queries);
          const long row = (b * s.heads + h) * s.queries + n;
          float* out = y + row * s.rank;
          for (long i = 0; i < queries; ++i)
            for (long p = 0; p < s.rank; ++p) *out++ = w.y[p * QUERIES + i];
          if (SOFTMAX) {
            out = soft->result + row * s.value_width;
            for (long i = 0; i < queries; ++i) {
              const float total = w.statistics[i];
              const float inverse = total > 0 ? 1 / total : 0;
              for (long c = 0; c < s.value_width; ++c) *out++ = w.out[c * QUERIES + i] * inverse;
              // of a query without keys: e^(score - inf) is 0
              soft->logsumexp[row + i] = total > 0 ? w.statistics[QUERIES + i] + std::log(total) : INFINITY;
            }
          }
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
int kart_backward(const Shape* shape, const float* options, const Strided* dy, const Strided* q, const Strided* k,
                  const Coefs* coefs, int own, const Mask* mask, float scale, const Soft* soft, float* dq, float* dk,
                  float* dcoefs, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const Features family(options);
  const Slots slots(order, threads);
  const long rank = round_up(s.rank, W), rows = s.keys * K;
  Buffer sums(slots.count * rows * rank);
  std::atomic<bool> failed{false};
  spread(order.count(), threads, [&](int thread, long begin, long end) {
    try {
      Scratch w(s, true);
      Buffer groups(rows * s.rank);
      long head = -1;
      float* sum = nullptr;
      for (long task = begin; task < end; ++task) {
        const long b = order.b(task), h = order.h(task);
        if (order.head(task) != head) {
          head = order.head(task);
          pack_groups(*coefs, coefs_at(*coefs, order, task), s, groups);
          sum = sums + slots.slot(thread, head) * rows * rank;
          std::fill(sum, sum + rows * rank, 0.0f);
        }
        w.take_keys(*k, k->at(b, h), s);
        if (SOFTMAX) w.take_values(soft->v, soft->v.at(b, h), s, true);
        std::fill(w.dk.data, w.dk.data + s.keys * w.width, 0.0f);
        std::fill(w.dv.data, w.dv.data + s.keys * w.value_width, 0.0f);
        for (long n = 0; n < s.queries; n += QUERIES) {
          const long queries = std::min<long>(QUERIES, s.queries - n);
          w.take_queries(*q, q->at(b, h) + n * q->n, queries, scale, s);
          pack_rows(dy->at(b, h) + n * dy->n, dy->n, dy->d, queries, QUERIES, s.rank, w.rank, 1.0f, w.dy_rows);
          pack_lanes(w.dy_rows, w.rank, w.dy_lanes);
          std::fill(w.dq.data, w.dq.data + queries * w.width, 0.0f);
          if (SOFTMAX) {
            const Strided &d = soft->dout, &o = soft->out;
            pack_rows(d.at(b, h) + n * d.n, d.n, d.d, queries, QUERIES, s.value_width, w.value_width, 1.0f,
                      w.out_rows);
            pack_lanes(w.out_rows, w.value_width, w.out);
            const float* out = o.at(b, h) + n * o.n;
            for (long i = 0; i < QUERIES; ++i) {
              float dot = 0;
              if (i < queries)
                for (long c = 0; c < s.value_width; ++c)
                  dot += w.out_rows[i * w.value_width + c] * out[i * o.n + c * o.d];
              w.statistics[i] = i < queries ? soft->logsumexp[(b * s.heads + h) * s.queries + n + i] : INFINITY;
              w.statistics[QUERIES + i] = dot;
            }
          }
          const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
          if (queries > W)
            backward_block<2>(family, s, w, groups, sum, mask_at, *mask, queries);
          else
            backward_block<1>(family, s, w, groups, sum, mask_at, *mask, queries);
          float* out = dq + ((b * s.heads + h) * s.queries + n) * s.width;
          for (long i = 0; i < queries; ++i)
            for (long c = 0; c < s.width; ++c) *out++ = scale * w.dq[i * w.width + c];
        }
        float* out = dk + (b * s.heads + h) * s.keys * s.width;
        for (long m = 0; m < s.keys; ++m, out += s.width) std::memcpy(out, w.dk + m * w.width, 4 * s.width);
        if (SOFTMAX) {
          out = soft->dv + (b * s.heads + h) * s.keys * s.value_width;
          for (long m = 0; m < s.keys; ++m, out += s.value_width)
            std::memcpy(out, w.dv + m * w.value_width, 4 * s.value_width);
        }
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) return 1;
  slots.collect(sums, rows * rank, [&](long head, const float* sum, bool fresh) {
    float* out = dcoefs + head * s.rank * rows;
    if (fresh) return transpose_matrix(sum, rank, rows, s.rank, out, rows);
    for (long p = 0; p < s.rank; ++p)
      for (long i = 0; i < rows; ++i) out[p * rows + i] += sum[i * rank + p];
  });
  return 0;
} catch (...) {
  return 1;
}

}  // extern "C"
