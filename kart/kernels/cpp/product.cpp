// The streamed product of a linear family in float32, forward and backward:
//   y[n, p] = sum_m mask[n, m] sum_j f_j(scale q_n . k_m) C[p, m, j],
// and, where SOFTMAX is 1, from the same scores softmax(scale q k^T) v. kart/kernels/cpp/build.py puts the
// family's `struct Piece` and the constants BASE and SOFTMAX before this file; what it computes is held
// against kart/kernels/chunked.py.

#include "operands.h"

// --- features --------------------------------------------------------------------------------------

// the family's features, then the base activation
struct Features : Piece {
  static constexpr int K = Piece::K + (BASE > 0);
  using Piece::Piece;
  INLINE void features(vec x, vec* f) const {
    Piece::features(x, f);
    vec unused;
    if constexpr (BASE > 0) f[K - 1] = activation<BASE>(x, unused);
  }
  INLINE void slopes(vec x, const vec* f, vec* g) const {
    Piece::slopes(x, f, g);
    if constexpr (BASE > 0) activation<BASE>(x, g[K - 1]);
  }
};

constexpr int K = Features::K;
// rows whose features stay in the level-1 cache, and those whose scores are taken at once: the tile unit reads its
// operands three pieces at a time, which would drive out everything else if it took turns with the vector unit
constexpr int TILE = K <= 6 ? 2 * ROWS : ROWS;
constexpr int LONGEST = TILES ? 256 : TILE;
static int span(bool unit) { return unit ? LONGEST : TILE; }

// scores (keys x LANES) to features (keys * K x LANES); `mask`, where given, has -1 or 0 for each score
template <int V>
static void fill_features(const Features& family, int keys, const float* scores, const int32_t* mask,
                          float* features) {
  for (int m = 0; m < keys; ++m, scores += LANES, features += K * LANES)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec f[K];
      family.features(load(scores + v * W), f);
      if (mask) {
        const ivec kept = *reinterpret_cast<const iloose*>(mask + m * LANES + v * W);
        UNROLL for (int j = 0; j < K; ++j) f[j] = keep(f[j], kept);
      }
      UNROLL for (int j = 0; j < K; ++j) store(features + j * LANES + v * W, f[j]);
    }
}

// --- score gradient --------------------------------------------------------------------------------

// ds[n] (+)= sum_j g[n][j] * (sum_p C[p][j] dy[n][p]) for N queries, features FIRST to FIRST + J of each key
template <int N, int FIRST, int J, int V>
static INLINE void pull(const Features& family, int rank, const float* coefs, const float* dy,
                        const float* scores, const int32_t* mask, const float* features, float* ds) {
  vec sum[N][J][V];
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[n][j][v] = vec{};
  for (int p = 0; p < rank; ++p, coefs += K * LANES) {
    vec x[N];
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) x[n] = splat(dy[n * rank + p]);
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const vec c = load(coefs + (FIRST + j) * LANES + v * W);
#pragma GCC unroll 12
        for (int n = 0; n < N; ++n) sum[n][j][v] += c * x[n];
      }
  }
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec f[K], g[K];
      UNROLL for (int j = 0; j < K; ++j) f[j] = load(features + (n * K + j) * LANES + v * W);
      family.slopes(load(scores + n * LANES + v * W), f, g);
      vec total = FIRST > 0 ? load(ds + n * LANES + v * W) : vec{};
      UNROLL for (int j = 0; j < J; ++j) total += sum[n][j][v] * g[FIRST + j];
      if (mask) total = keep(total, *reinterpret_cast<const iloose*>(mask + n * LANES + v * W));
      store(ds + n * LANES + v * W, total);
    }
}

// for N queries, FIRST on: as many features at a time as fill the registers
template <int N, int FIRST, int V>
static INLINE void pull_from(const Features& family, int rank, const float* coefs, const float* dy,
                             const float* scores, const int32_t* mask, const float* features, float* ds) {
  if constexpr (FIRST < K) {
    constexpr int J = std::min(ROWS / N, K - FIRST);
    pull<N, FIRST, J, V>(family, rank, coefs, dy, scores, mask, features, ds);
    pull_from<N, FIRST + J, V>(family, rank, coefs, dy, scores, mask, features, ds);
  }
}

// Queries at a time: three features of each fill the registers, and what is loaded of C serves them all.
constexpr int AT_ONCE = ROWS / std::min(K, 3);

template <int V>
static void score_gradient(const Features& family, int queries, int rank, const float* coefs, const float* dy,
                           const float* scores, const int32_t* mask, const float* features, float* ds) {
  const auto kept = [mask](long n) { return mask ? mask + n * LANES : nullptr; };
  long n = 0;
  for (; n + AT_ONCE <= queries; n += AT_ONCE)
    pull_from<AT_ONCE, 0, V>(family, rank, coefs, dy + n * rank, scores + n * LANES, kept(n), features + n * K * LANES,
                       ds + n * LANES);
  for (; n < queries; ++n)
    pull_from<1, 0, V>(family, rank, coefs, dy + n * rank, scores + n * LANES, kept(n), features + n * K * LANES,
                       ds + n * LANES);
}

// C as (key, feature, p)
static void pack_coefs(const Coefs& c, const float* x, const Shape& s, float* out) {
  if (c.j == 1 && c.m == K) return transpose_matrix(x, c.p, s.rank, s.keys * K, out, s.rank);
  for (long m = 0; m < s.keys; ++m)
    for (long j = 0; j < K; ++j)
      for (long p = 0; p < s.rank; ++p) *out++ = x[p * c.p + m * c.m + j * c.j];
}

// C as (block of LANES keys, p, feature, key); zero beyond the last key
static void pack_blocks(const Coefs& c, const float* x, const Shape& s, float* out) {
  for (long first = 0; first < s.keys; first += LANES)
    for (long p = 0; p < s.rank; ++p)
      for (long j = 0; j < K; ++j)
        for (long m = first; m < first + LANES; ++m) *out++ = m < s.keys ? x[p * c.p + m * c.m + j * c.j] : 0.0f;
}

static bool on_unit(const Shape& s, long width) { return worth(s.queries, s.keys, width); }

// --- one head of one sample ------------------------------------------------------------------------

// Forward: lanes are queries, so that the sum over keys and features stays in registers.
struct Forward {
  Rows keys, values;
  Lanes queries;
  Between between;
  Buffer scores, features, y, weights, out, statistics, rows;
  std::vector<int32_t> mask;
  explicit Forward(const Shape& s)
      : keys(s.keys, s.width, false, on_unit(s, s.width)),
        values(SOFTMAX ? s.keys : 0, s.value_width, true, SOFTMAX && on_unit(s, s.value_width)),
        queries(s.width, false, keys.unit),
        between(SOFTMAX ? s.keys : 0, values.unit),
        scores(span(keys.unit) * LANES),
        features(TILE * K * LANES),
        y(s.rank * LANES),
        weights(SOFTMAX ? s.keys * LANES : 0),
        out(SOFTMAX ? values.padded * LANES : 0),
        statistics(2 * LANES),
        rows(SOFTMAX ? LANES * values.padded : 0),
        mask(span(keys.unit) * LANES) {}
};

// the scores of a tile in place of hidden ones -inf, their greatest so far, and which queries have a key
template <int V>
static void take_weights(int keys, const float* scores, const int32_t* mask, float* weights, vec* greatest,
                         ivec* attend) {
  for (int m = 0; m < keys; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec x = load(scores + m * LANES + v * W);
      if (mask) {
        const ivec kept = *reinterpret_cast<const iloose*>(mask + m * LANES + v * W);
        x = kept ? x : splat(-INFINITY);
        attend[v] |= kept;
      }
      greatest[v] = clamp_above(greatest[v], x);
      store(weights + m * LANES + v * W, x);
    }
}

template <int V>
static void forward_block(const Features& family, const Shape& s, Forward& w, const float* coefs,
                          const uint8_t* mask_at, const Mask& mask, long queries) {
  std::fill(w.y.data, w.y.data + s.rank * LANES, 0.0f);
  vec greatest[2] = {splat(-INFINITY), splat(-INFINITY)};
  ivec attend[2] = {ivec{}, ivec{}};
  const int32_t* kept = mask.data ? w.mask.data() : nullptr;
  const int most = span(w.keys.unit);
  for (long first = 0; first < s.keys; first += most) {
    const int keys = std::min<long>(most, s.keys - first);
    w.keys.dots<V>(w.queries, first, keys, w.scores);
    if (kept) pack_mask(mask_at + first * mask.m, mask.m, mask.n, keys, queries, w.mask.data());
    for (int m = 0; m < keys; m += TILE) {
      const int some = std::min(TILE, keys - m);
      fill_features<V>(family, some, w.scores + m * LANES, kept ? kept + m * LANES : nullptr, w.features);
      gemm<ROWS, V, 1>(s.rank, (long)some * K, coefs + (first + m) * K * s.rank, s.rank, w.features, LANES, w.y, LANES,
                       true);
    }
    if constexpr (SOFTMAX) take_weights<V>(keys, w.scores, kept, w.weights + first * LANES, greatest, attend);
  }
  if constexpr (SOFTMAX) {
    vec total[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      // a query without keys: its weights are e^-inf whatever is taken away; scores of -inf alone are NaN
      if (kept) greatest[v] = attend[v] ? greatest[v] : vec{};
      total[v] = vec{};
    }
    for (long m = 0; m < s.keys; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* at = w.weights + m * LANES + v * W;
        const vec e = exponential(load(at) - greatest[v]);
        total[v] += e;
        store(at, e);
      }
    w.between.take<V, false>(w.weights, s.keys);
    w.values.sum<V>(w.between, w.weights, 0, s.keys, queries, w.out, false);
    for (int v = 0; v < V; ++v) {
      store(w.statistics + v * W, total[v]);
      store(w.statistics + LANES + v * W, greatest[v]);
    }
  }
}

// Backward: lanes are keys, so that the sums over queries, of dC and dk, run over rows; a block of keys meets
// all queries before the next.
struct Backward {
  int most;
  Rows queries, douts;
  Lanes keys, values;
  Between between;
  Buffer dy, scores, features, gradient, dq, dk, weights, dv, rows, logsumexp, dots;
  std::vector<int32_t> mask;
  explicit Backward(const Shape& s)
      : most(span(on_unit(s, s.width) || (SOFTMAX && on_unit(s, s.value_width)))),
        queries(s.queries, s.width, true, on_unit(s, s.width)),
        douts(SOFTMAX ? s.queries : 0, s.value_width, true, SOFTMAX && on_unit(s, s.value_width)),
        keys(s.width, true, queries.unit),
        values(SOFTMAX ? s.value_width : 0, false, douts.unit),
        between(most, queries.unit || douts.unit),
        dy(s.queries * s.rank),
        scores(most * LANES),
        features(TILE * K * LANES),
        gradient(most * LANES),
        dq(queries.whole * queries.padded),
        dk(queries.padded * LANES),
        weights(SOFTMAX ? most * LANES : 0),
        dv(SOFTMAX ? douts.padded * LANES : 0),
        rows(LANES * std::max(queries.padded, douts.padded)),
        logsumexp(SOFTMAX ? s.queries : 0),
        dots(SOFTMAX ? s.queries : 0),
        mask(most * LANES) {}

  void take_queries(const Strided& q, const float* x, float scale, const Strided& d, const float* y, const Shape& s) {
    queries.take(q, x, scale);
    pack_rows(y, d.n, d.d, s.queries, s.queries, s.rank, s.rank, 1.0f, dy);
    std::fill(dq.data, dq.data + queries.whole * queries.padded, 0.0f);
  }
  void take_outputs(const Strided& d, const float* x, const Strided& o, const float* out, const float* sums,
                    const Shape& s) {
    douts.take(d, x, 1.0f);
    for (long n = 0; n < s.queries; ++n, out += o.n) {
      logsumexp[n] = sums[n];
      dots[n] = dot(douts.rows() + n * douts.padded, out, o.d, s.value_width);
    }
  }
};

// one block of `keys` keys; `mask_at` is at its first.
template <int V>
static void backward_block(const Features& family, const Shape& s, Backward& w, int keys, const float* coefs,
                           float* dcoefs, const uint8_t* mask_at, const Mask& mask) {
  const int32_t* kept = mask.data ? w.mask.data() : nullptr;
  for (long first = 0; first < s.queries; first += w.most) {
    const int queries = std::min<long>(w.most, s.queries - first);
    w.queries.dots<V>(w.keys, first, queries, w.scores);
    if (kept) pack_mask(mask_at + first * mask.n, mask.n, mask.m, queries, keys, w.mask.data());
    for (int n = 0; n < queries; n += TILE) {
      const int some = std::min(TILE, queries - n), at = n * LANES;
      fill_features<V>(family, some, w.scores + at, kept ? kept + at : nullptr, w.features);
      const float* dy = w.dy + (first + n) * s.rank;
      score_gradient<V>(family, some, s.rank, coefs, dy, w.scores + at, kept ? kept + at : nullptr, w.features,
                        w.gradient + at);
      for (int j = 0; j < K; ++j)
        gemm<ROWS, V, 1>(s.rank, some, dy, s.rank, w.features + j * LANES, K * LANES, dcoefs + j * LANES, K * LANES,
                         true);
    }
    if constexpr (SOFTMAX) {
      // dL/dweights, then the weights
      w.douts.dots<V>(w.values, first, queries, w.weights);
      for (int n = 0; n < queries; ++n)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const long at = n * LANES + v * W, row = first + n;
          vec p = exponential(load(w.scores + at) - w.logsumexp[row]);
          if (kept) p = keep(p, *reinterpret_cast<const iloose*>(kept + at));
          store(w.gradient + at, load(w.gradient + at) + p * (load(w.weights + at) - w.dots[row]));
          store(w.weights + at, p);
        }
      w.between.take<V, false>(w.weights, queries);
      w.douts.sum<V>(w.between, w.weights, first, queries, keys, w.dv, true);
    }
    w.between.take<V, true>(w.gradient, queries);
    w.queries.sum<V>(w.between, w.gradient, first, queries, keys, w.dk, true);
    sum_lanes(w.keys, w.between, w.gradient, queries, w.dq + first * w.queries.padded);
  }
}

// What softmax adds: its values, the gradient of its output and that output, which `result` is in the forward;
// the logarithm of its sums, contiguous; the gradient of the values.
struct Soft {
  Strided v, dout, out;
  Room result, dv;
  float* logsumexp;
};

extern "C" {

// y is contiguous (batch, heads, queries, rank); returns 0, or 1 without memory
int kart_forward(const Shape* shape, const float* options, const Strided* q, const Strided* k, const Coefs* coefs,
                 int own, const Mask* mask, float scale, const Soft* soft, float* y, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const Features family(options);
  spread(order.count(), threads, [&](int, long begin, long end) {
    const Tiles tiles;
    Forward w(s);
    Buffer packed(s.keys * K * s.rank);
    long head = -1;
    for (long task = begin; task < end; ++task) {
      const long b = order.b(task), h = order.h(task);
      if (order.head(task) != head) {
        head = order.head(task);
        pack_coefs(*coefs, coefs_at(*coefs, order, task), s, packed);
      }
      w.keys.take(*k, k->at(b, h), 1.0f);
      if (SOFTMAX) w.values.take(soft->v, soft->v.at(b, h), 1.0f);
      for (long n = 0; n < s.queries; n += LANES) {
        const long queries = std::min<long>(LANES, s.queries - n);
        w.queries.take(*q, q->at(b, h) + n * q->n, queries, scale);
        const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
        if (queries > W)
          forward_block<2>(family, s, w, packed, mask_at, *mask, queries);
        else
          forward_block<1>(family, s, w, packed, mask_at, *mask, queries);
        const long row = (b * s.heads + h) * s.queries + n;
        float* out = y + row * s.rank;
        for (long i = 0; i < queries; ++i)
          for (long p = 0; p < s.rank; ++p) *out++ = w.y[p * LANES + i];
        if (SOFTMAX) {
          out = soft->result.at(b, h) + n * soft->result.n;
          const float* own = w.values.lane_rows(w.out, w.rows);
          for (long i = 0; i < queries; ++i) {
            const float total = w.statistics[i];
            const float inverse = total == 0 ? 0 : 1 / total;
            for (long c = 0; c < s.value_width; ++c) out[i * soft->result.n + c] = own[i * w.values.padded + c] * inverse;
            // of a query without keys: e^(score - inf) is 0
            soft->logsumexp[row + i] = total == 0 ? INFINITY : w.statistics[LANES + i] + std::log(total);
          }
        }
      }
    }
  });
  return 0;
} catch (...) {
  return 1;
}

// dcoefs is contiguous (samples with coefficients, heads, rank, keys, K)
int kart_backward(const Shape* shape, const float* options, const Strided* dy, const Strided* q, const Strided* k,
                  const Coefs* coefs, int own, const Mask* mask, float scale, const Soft* soft, const Room* dq,
                  const Room* dk, float* dcoefs, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const Features family(options);
  const Slots slots(order, threads);
  const long blocks = round_up(s.keys, LANES) / LANES, block = s.rank * K * LANES, size = blocks * block;
  // of a head that one sample has the sum is done with it, and the room is the next one's
  const bool alone = order.batch == 1;
  Buffer sums((alone ? threads : slots.count) * size);
  const auto collect = [&](long head, const float* sum, bool fresh) {
    float* out = dcoefs + head * s.rank * s.keys * K;
    for (long p = 0; p < s.rank; ++p)
      for (long first = 0; first < s.keys; first += LANES) {
        const float* x = sum + first / LANES * block + p * K * LANES;
        for (long m = 0; m < std::min<long>(LANES, s.keys - first); ++m)
          for (long j = 0; j < K; ++j, ++out) *out = fresh ? x[j * LANES + m] : *out + x[j * LANES + m];
      }
  };
  spread(order.count(), threads, [&](int thread, long begin, long end) {
    const Tiles tiles;
    Backward w(s);
    Buffer packed(size);
    long head = -1;
    float* sum = nullptr;
    for (long task = begin; task < end; ++task) {
      const long b = order.b(task), h = order.h(task);
      if (order.head(task) != head) {
        head = order.head(task);
        pack_blocks(*coefs, coefs_at(*coefs, order, task), s, packed);
        sum = sums + (alone ? thread : slots.slot(thread, head)) * size;
        std::fill(sum, sum + size, 0.0f);
      }
      w.take_queries(*q, q->at(b, h), scale, *dy, dy->at(b, h), s);
      if (SOFTMAX)
        w.take_outputs(soft->dout, soft->dout.at(b, h), soft->out, soft->out.at(b, h),
                       soft->logsumexp + (b * s.heads + h) * s.queries, s);
      for (long i = 0; i < blocks; ++i) {
        const long first = i * LANES;
        const int keys = std::min<long>(LANES, s.keys - first);
        w.keys.take(*k, k->at(b, h) + first * k->n, keys, 1.0f);
        std::fill(w.dk.data, w.dk.data + w.keys.padded * LANES, 0.0f);
        if (SOFTMAX) {
          w.values.take(soft->v, soft->v.at(b, h) + first * soft->v.n, keys, 1.0f);
          std::fill(w.dv.data, w.dv.data + w.values.padded * LANES, 0.0f);
        }
        const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + first * mask->m : nullptr;
        (keys > W ? backward_block<2> : backward_block<1>)(family, s, w, keys, packed + i * block, sum + i * block,
                                                           mask_at, *mask);
        const float* own = w.queries.lane_rows(w.dk, w.rows);
        for (int m = 0; m < keys; ++m)
          std::memcpy(dk->at(b, h) + (first + m) * dk->n, own + m * w.queries.padded, 4 * s.width);
        if (SOFTMAX) {
          own = w.douts.lane_rows(w.dv, w.rows);
          for (int m = 0; m < keys; ++m)
            std::memcpy(soft->dv.at(b, h) + (first + m) * soft->dv.n, own + m * w.douts.padded, 4 * s.value_width);
        }
      }
      float* out = dq->at(b, h);
      for (long n = 0; n < s.queries; ++n, out += dq->n)
        for (long c = 0; c < s.width; ++c) out[c] = scale * w.dq[n * w.queries.padded + c];
      if (alone) collect(head, sum, true);
    }
  });
  if (!alone) slots.collect(sums, size, collect);
  return 0;
} catch (...) {
  return 1;
}

}  // extern "C"
