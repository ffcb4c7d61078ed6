// Attention whose weights are functions of one score, or of it and of the place of its key, in float32, forward
// and backward. With scores s = scale q_n . k_m and entries y = phi(s) of the head's one function, or y = table[n -
// m] where PLACES is defined, or y = table[n, m] where MATRIX is, plus a function of s of that place where PAIRS is,
//   out[n] = sum_m w[n, m] v[m],
// where w is, by FORM, 0: c y; 1: y / sum |y|; 2: softmax(y); 3: softmax(s + y); 4: c y + softmax(s); 5: y projected
// onto the simplex; with a factor c of each query. The family's `struct Unit` and the constants come before this file.

#include <cfloat>

#include "operands.h"

constexpr bool SOFT = 2 <= FORM && FORM <= 4, SIMPLEX = FORM == 5;
// a second output, that of softmax alone or the mean of the values that the simplex keeps
constexpr bool TWO = FORM >= 4;
constexpr int KEYS = 4 * ROWS, LONGEST = TILES ? 128 : KEYS;
// queries, up to which the lanes of the forward are keys: fewer leave most of a block of queries empty
constexpr int FEW = SIMPLEX ? 0 : W / 4;

// --- entries ---------------------------------------------------------------------------------------

// `at(n, m)` says where an entry of a table is, of a vector of queries from n on; `along` are those of a vector of keys
// from m on, of any where there are no more. `sum` is what all samples of the head add their gradient to.

struct Table {
  static constexpr int P = 1;
  const float* table;
  float* gradient;
  long last;  // key
  INLINE vec value(vec, long at) const { return load(table + at); }
  INLINE vec slope(vec, vec dy, vec*, long at) const {
    store(gradient + at, load(gradient + at) + dy);
    return vec{};
  }
  // of the keys from m on, the first of them at `at`
  INLINE vec lanes(vec y, long at, long step, long m) const {
    for (int i = 0; i < W; ++i) y[i] = table[at + std::min<long>(i, last - m) * step];
    return y;
  }
};

#if defined(MATRIX) || defined(PAIRS)

// Entries of every query and key, (blocks, keys, BLOCK) with the queries in blocks.
struct Pairwise : Table {
  Pairwise(const float* theta, long keys, float* sum) : Table{theta, sum, keys - 1} {}
  static long room(long) { return 0; }
  INLINE long at(long n, long m) const { return (n / BLOCK * (last + 1) + m) * BLOCK + n % BLOCK; }
  INLINE vec along(vec y, long n, long m) const { return lanes(y, at(n, m), BLOCK, m); }
  void finish(const vec*, float*, long) const {}
};

#ifdef MATRIX

struct Entry : Pairwise {
  Entry(const float*, const float* theta, float*, long, long keys, float* sum) : Pairwise(theta, keys, sum) {}
};

#else

// After those entries the coefficients of a function of the score for each of them, feature by feature.
struct Entry : Pairwise {
  static constexpr int K = Piece::K;
  Piece piece;
  long step;
  Entry(const float* options, const float* theta, float*, long size, long keys, float* sum)
      : Pairwise(theta, keys, sum), piece(options), step(size / (1 + K)) {}
  INLINE vec value(vec x, long at) const {
    vec f[K], y = load(table + at);
    piece.features(x, f);
    UNROLL for (int j = 0; j < K; ++j) y += load(table + at + (j + 1) * step) * f[j];
    return y;
  }
  INLINE vec along(vec x, long n, long m) const {
    vec f[K], y = Pairwise::along(x, n, m);
    piece.features(x, f);
    UNROLL for (int j = 0; j < K; ++j) y += lanes(x, at(n, m) + (j + 1) * step, BLOCK, m) * f[j];
    return y;
  }
  INLINE vec slope(vec x, vec dy, vec* sums, long at) const {
    vec f[K], g[K], y = Table::slope(x, dy, sums, at);
    piece.features(x, f);
    piece.slopes(x, f, g);
    UNROLL for (int j = 0; j < K; ++j) {
      const long own = at + (j + 1) * step;
      store(gradient + own, load(gradient + own) + dy * f[j]);
      y += load(table + own) * g[j];
    }
    return y;
  }
};

#endif

#elif defined(PLACES)

// Entries of every offset, with room for a block of queries beyond the last.
struct Entry : Table {
  Entry(const float*, const float* theta, float* room, long size, long keys, float*)
      : Table{room, room + size + LANES, keys - 1} {
    std::copy(theta, theta + size, room);
    std::fill(room + size, room + 2 * (size + LANES), 0.0f);
  }
  static long room(long size) { return 2 * (size + LANES); }
  INLINE long at(long n, long m) const { return n + last - m; }
  INLINE vec along(vec y, long n, long m) const { return lanes(y, at(n, m), -1, m); }
  void finish(const vec*, float* sum, long size) const {
    for (long i = 0; i < size; ++i) sum[i] += gradient[i];
  }
};

#else

#include "unit.h"

// A function of the score.
struct Entry {
  static constexpr int P = Based::P;
  Based unit;
  Entry(const float* options, const float* theta, float*, long, long, float*) : unit(options, theta) {}
  static long room(long) { return 0; }
  INLINE long at(long, long) const { return 0; }
  INLINE vec value(vec x, long) const { return unit.value(x); }
  INLINE vec along(vec x, long, long) const { return unit.value(x); }
  INLINE vec slope(vec x, vec dy, vec* sums, long) const { return unit.slope(x, dy, sums); }
  void finish(const vec* sums, float* gradient, long) const {
    float own[P], found[P];
    for (int i = 0; i < P; ++i) own[i] = total(sums[i]);
    unit.finish(own, found);
    for (int i = 0; i < P; ++i) gradient[i] += found[i];
  }
};

#endif

// --- one block of queries --------------------------------------------------------------------------

static bool few(const Shape& s) { return s.queries <= FEW; }

struct Scratch {
  Rows keys, values;
  Lanes queries, douts;
  Between between;
  Buffer weights, soft, scores, out, soft_out, dq, dk, dv, turned, rows, room;
  std::vector<int32_t> mask;
  Scratch(const Shape& s, long size, bool backward)
      : keys(s.keys, s.width, backward, worth(s.queries, s.keys, s.width)),
        values(s.keys, s.value_width, !backward, worth(s.queries, s.keys, s.value_width)),
        queries(s.width, backward, keys.unit),
        douts(backward ? s.value_width : 0, true, values.unit),
        between(backward ? LONGEST : s.keys, keys.unit || values.unit),
        weights(backward ? LONGEST * LANES : round_up(s.keys, SIDE) * (few(s) ? 1 : LANES)),
        soft(TWO && !backward ? round_up(s.keys, SIDE) * (few(s) ? 1 : LANES) : 0),
        scores(backward ? LONGEST * LANES : 0),
        out(values.padded * LANES),
        soft_out(TWO ? values.padded * LANES : 0),
        dq(backward ? keys.padded * LANES : 0),
        dk(backward ? keys.whole * keys.padded : 0),
        dv(backward ? values.whole * values.padded : 0),
        turned(2 * LANES * std::max(keys.padded, values.padded)),
        rows(3 * LANES),
        room(Entry::room(size)),
        mask(LONGEST * LANES) {}
  int span() const { return keys.unit || values.unit ? LONGEST : KEYS; }
};

static INLINE ivec mask_of(const Scratch& w, int at) { return *reinterpret_cast<const iloose*>(w.mask.data() + at); }

// Entries in w.weights as their projections, 1 in w.soft where that is not zero; `total` counts those, and what is taken
// away from them is `greatest`, then `low`: one number would round where entries are large. Michelot's sets: the
// threshold of the entries above the last one, from below, so that every set holds the support and the last one is it.
template <int V>
static void project(const Shape& s, Scratch& w, const vec* bad, vec* greatest, vec* low, vec* total) {
  for (int v = 0; v < V; ++v) {
    low[v] = splat(-1.0f);
    greatest[v] = greatest[v] > -INFINITY ? greatest[v] : vec{};
  }
  for (long m = 0; m < s.keys; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const long i = m * LANES + v * W;
      store(w.weights + i, load(w.weights + i) - greatest[v]);
    }
  for (bool moved = true; moved;) {
    vec sum[2] = {vec{}, vec{}}, count[2] = {vec{}, vec{}};
    for (long m = 0; m < s.keys; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const vec x = load(w.weights + m * LANES + v * W);
        const ivec in = x > low[v];
        sum[v] += keep(x, in);
        count[v] += keep(splat(1.0f), in);
      }
    moved = false;
    for (int v = 0; v < V; ++v) {
      const vec next = (sum[v] - 1.0f) / count[v];
      const ivec grows = next > low[v];
      for (int i = 0; i < W; ++i) moved |= grows[i] != 0;
      low[v] = grows ? next : low[v];
      total[v] = count[v];
    }
  }
  for (long m = 0; m < s.keys; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const long i = m * LANES + v * W;
      const vec x = load(w.weights + i);
      const ivec in = x > low[v];
      store(w.weights + i, keep(x - low[v], in) + bad[v]);
      store(w.soft + i, keep(splat(1.0f), in));
    }
  for (int v = 0; v < V; ++v) greatest[v] += bad[v];
}

// Infinite entries as the largest there are: those of +inf share a row, and those of -inf have none of it unless there
// are no others. NaN stays NaN.
static INLINE vec within(vec y) { return clamp(y, -FLT_MAX, FLT_MAX); }

// weights before they are divided by `total`; `greatest` is in the exponents of softmax
template <int V>
static void forward_block(const Entry& entry, const Shape& s, Scratch& w, const uint8_t* mask_at, const Mask& mask,
                          long n, long queries) {
  // `bad` is zero, or NaN where an entry is
  vec greatest[2] = {splat(-INFINITY), splat(-INFINITY)}, total[2] = {vec{}, vec{}}, bad[2] = {vec{}, vec{}}, low[2];
  ivec attend[2] = {ivec{}, ivec{}};  // queries with a key
  for (long first = 0; first < s.keys; first += w.span()) {
    const int keys = std::min<long>(w.span(), s.keys - first);
    float* at = w.weights + first * LANES;
    w.keys.dots<V>(w.queries, first, keys, at);
    if (mask.data) pack_mask(mask_at + first * mask.m, mask.m, mask.n, keys, queries, w.mask.data());
    for (int m = 0; m < keys; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const int i = m * LANES + v * W;
        vec x = load(at + i);
        if (mask.data) x = keep(x, mask_of(w, i));
        vec y = entry.value(x, entry.at(n + v * W, first + m));
        if (FORM == 3) y += x;
        if (SIMPLEX) {
          y = within(y);
          bad[v] += mask.data ? keep(y * 0.0f, mask_of(w, i)) : y * 0.0f;
        }
        if (mask.data) {
          const ivec kept = mask_of(w, i);
          if (SOFT) attend[v] |= kept;
          if (FORM == 4) x = kept ? x : splat(-INFINITY);
          y = SIMPLEX || (SOFT && FORM < 4) ? (kept ? y : splat(-INFINITY)) : keep(y, kept);
        }
        if (FORM == 1) total[v] += magnitude(y);
        if (SOFT || SIMPLEX) greatest[v] = clamp_above(greatest[v], FORM == 4 ? x : y);
        store(at + i, y);
        if (FORM == 4) store(w.soft + first * LANES + i, x);
      }
  }
  if (SIMPLEX) project<V>(s, w, bad, greatest, low, total);
  if (SOFT) {
    float* at = FORM == 4 ? w.soft : w.weights;
    // a query without keys: its weights are e^-inf whatever is taken away; entries of -inf alone are NaN
    for (int v = 0; v < V && mask.data; ++v) greatest[v] = attend[v] ? greatest[v] : vec{};
    for (long m = 0; m < s.keys; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const vec e = exponential(load(at + m * LANES + v * W) - greatest[v]);
        total[v] += e;
        store(at + m * LANES + v * W, e);
      }
  }
  w.between.take<V, false>(w.weights, s.keys);
  w.values.sum<V>(w.between, w.weights, 0, s.keys, queries, w.out, false);
  if (TWO) {
    w.between.take<V, false>(w.soft, s.keys);
    w.values.sum<V>(w.between, w.soft, 0, s.keys, queries, w.soft_out, false);
  }
  for (int v = 0; v < V; ++v) {
    store(w.rows + v * W, total[v]);
    store(w.rows + LANES + v * W, greatest[v]);
    if (SIMPLEX) store(w.rows + 2 * LANES + v * W, low[v]);
  }
}

// --- one query -------------------------------------------------------------------------------------

// products of a query and W rows, `step` apart, as lanes; beyond the last, of the last again
static INLINE vec along_rows(const float* query, const float* rows, long step, long width, long last, float* corner) {
  for (long i = 0; i < W; ++i) {
    const float* row = rows + std::min(i, last) * step;
    vec sum{};
    for (long c = 0; c < width; c += W) sum += load(query + c) * load(row + c);
    store(corner + i * W, sum);
  }
  transpose(corner, W, corner, W);
  vec x = load(corner);
  for (int i = 1; i < W; ++i) x += load(corner + i * W);
  return x;
}

// `forward_block` of the query n alone, in lanes of keys
static void forward_row(const Entry& entry, const Shape& s, Scratch& w, const uint8_t* mask_at, const Mask& mask, long n) {
  const float* query = w.queries.rows();
  long step;
  const float* rows = w.keys.lying(step);
  alignas(64) float corner[W * W];
  vec most = splat(-INFINITY), sum{};
  ivec attend{};
  for (long m = 0; m < s.keys; m += W) {
    ivec kept;
    for (int i = 0; i < W; ++i) kept[i] = m + i < s.keys && (!mask.data || mask_at[(m + i) * mask.m]) ? -1 : 0;
    vec x = keep(along_rows(query, rows + m * step, step, w.keys.padded, s.keys - 1 - m, corner), kept);
    vec y = entry.along(x, n, m);
    if (FORM == 3) y += x;
    if (FORM == 4) x = kept ? x : splat(-INFINITY);
    y = SOFT && FORM < 4 ? (kept ? y : splat(-INFINITY)) : keep(y, kept);
    if (FORM == 1) sum += magnitude(y);
    if (SOFT) most = clamp_above(most, FORM == 4 ? x : y);
    attend |= kept;
    store(w.weights + m, y);
    if (FORM == 4) store(w.soft + m, x);
  }
  float greatest = -INFINITY;
  if (SOFT) {
    float* at = FORM == 4 ? w.soft : w.weights;
    bool some = false;
    for (int i = 0; i < W; ++i) {
      greatest = most[i] < greatest ? greatest : most[i];
      some |= attend[i] != 0;
    }
    if (!some) greatest = 0;
    for (long m = 0; m < s.keys; m += W) {
      const vec e = exponential(load(at + m) - greatest);
      sum += e;
      store(at + m, e);
    }
  }
  rows = w.values.lying(step);
  const long padded = w.values.padded;
  wide_gemm<WIDE_ROWS, 1>(1, padded, s.keys, w.weights, 1, rows, step, w.out, padded, false);
  if (TWO) wide_gemm<WIDE_ROWS, 1>(1, padded, s.keys, w.soft, 1, rows, step, w.soft_out, padded, false);
  w.rows[0] = total(sum);
  w.rows[LANES] = greatest;
}

// w.rows: factor or inverse of the sum, or logarithm of the sum, or the greatest entry of a projection; sum of weights
// times their gradients, or the mean of these where the simplex keeps a weight; factor, or what a projection takes away
// beside the greatest entry
template <int V>
static void backward_block(const Entry& entry, const Shape& s, Scratch& w, vec* sums, const uint8_t* mask_at,
                           const Mask& mask, long n, long queries) {
  for (long first = 0; first < s.keys; first += w.span()) {
    const int keys = std::min<long>(w.span(), s.keys - first);
    w.keys.dots<V>(w.queries, first, keys, w.scores);
    w.values.dots<V>(w.douts, first, keys, w.weights);
    if (mask.data) pack_mask(mask_at + first * mask.m, mask.m, mask.n, keys, queries, w.mask.data());
    for (int m = 0; m < keys; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const int i = m * LANES + v * W;
        const long place = entry.at(n + v * W, first + m);
        const vec row = load(w.rows + v * W), pull = load(w.weights + i);
        vec x = load(w.scores + i);
        if (mask.data) x = keep(x, mask_of(w, i));
        const vec y = entry.value(x, place);
        // the weight, the gradient of y, and of s beside y
        vec weight, g, beside = vec{};
        if constexpr (FORM == 0) {
          weight = row * y;
          g = row * pull;
        } else if constexpr (FORM == 1) {
          weight = row * y;
          g = row * (pull - sign(y) * load(w.rows + LANES + v * W));
        } else if constexpr (SIMPLEX) {
          const vec over = within(y) - row - load(w.rows + 2 * LANES + v * W);
          const ivec in = over > 0.0f;
          weight = keep(over, in) + keep(row, row != row);
          g = keep(pull - load(w.rows + LANES + v * W), in & (magnitude(y) <= FLT_MAX));
        } else if constexpr (FORM == 4) {
          const vec p = exponential(x - row), c = load(w.rows + 2 * LANES + v * W);
          weight = c * y + p;
          g = c * pull;
          beside = p * (pull - load(w.rows + LANES + v * W));
        } else {
          weight = exponential((FORM == 3 ? x + y : y) - row);
          g = weight * (pull - load(w.rows + LANES + v * W));
        }
        if (mask.data) {
          const ivec kept = mask_of(w, i);
          weight = keep(weight, kept);
          g = keep(g, kept);
          beside = keep(beside, kept);
        }
        if (FORM == 3) beside = g;
        store(w.weights + i, weight);
        store(w.scores + i, entry.slope(x, g, sums, place) * g + beside);
      }
    w.between.take<V, true>(w.weights, keys);
    sum_lanes(w.douts, w.between, w.weights, keys, w.dv + first * w.values.padded);
    w.between.take<V, true>(w.scores, keys);
    sum_lanes(w.queries, w.between, w.scores, keys, w.dk + first * w.keys.padded);
    w.keys.sum<V>(w.between, w.scores, first, keys, queries, w.dq, true);
  }
}

// --- all heads of all samples ----------------------------------------------------------------------

// Contiguous: theta (samples with their own or 1, heads, size), factor, statistic and, of the simplex, low (batch, heads,
// queries), and dtheta; soft is the second output.
struct Extra {
  const float *theta, *factor;
  float *statistic, *low, *dtheta;
  int64_t size;
  Room soft;
};

extern "C" {

// returns 0, or 1 without memory
int kart_forward(const Shape* shape, const float* options, const Strided* q, const Strided* k, const Strided* v,
                 const Mask* mask, const Extra* extra, int own, float scale, const Room* out, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  spread(order.count(), threads, [&](int, long begin, long end) {
    const Tiles tiles;
    Scratch w(s, extra->size, false);
    for (long task = begin; task < end; ++task) {
      const long b = order.b(task), h = order.h(task);
      const float* theta = extra->theta + order.head(task) * extra->size;
      const Entry entry(options, theta, w.room, extra->size, s.keys, nullptr);
      w.keys.take(*k, k->at(b, h), 1.0f);
      w.values.take(*v, v->at(b, h), 1.0f);
      const long most = few(s) ? 1 : LANES;
      for (long n = 0; n < s.queries; n += most) {
        const long queries = std::min<long>(most, s.queries - n), row = (b * s.heads + h) * s.queries + n;
        w.queries.take(*q, q->at(b, h) + n * q->n, queries, scale);
        const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
        if (few(s))
          forward_row(entry, s, w, mask_at, *mask, n);
        else if (queries > W)
          forward_block<2>(entry, s, w, mask_at, *mask, n, queries);
        else
          forward_block<1>(entry, s, w, mask_at, *mask, n, queries);
        const float *found = w.values.lane_rows(w.out, w.turned), *apart = nullptr;
        if (TWO) apart = w.values.lane_rows(w.soft_out, w.turned + LANES * w.values.padded);
        for (long i = 0; i < queries; ++i) {
          const float total = w.rows[i], greatest = w.rows[LANES + i];
          const float c = extra->factor ? extra->factor[row + i] : 1.0f;
          // of a query without keys: e^(score - inf) is 0
          if (SOFT) extra->statistic[row + i] = total == 0 ? INFINITY : greatest + std::log(total);
          if (SIMPLEX) extra->statistic[row + i] = total == 0 && greatest == greatest ? INFINITY : greatest;
          if (SIMPLEX) extra->low[row + i] = w.rows[2 * LANES + i];
          // a row of zeros stays one
          const float inverse = FORM == 1 ? 1 / std::max(total, FLT_MIN) : total > 0 ? 1 / total : total;
          if (FORM == 1) extra->statistic[row + i] = inverse;
          const float times = SIMPLEX ? 1.0f : FORM == 0 || FORM == 4 ? c : inverse;
          float* at = out->at(b, h) + (n + i) * out->n;
          for (long e = 0; e < s.value_width; ++e) at[e] = found[i * w.values.padded + e] * times;
          if (TWO) {
            float* beside = extra->soft.at(b, h) + (n + i) * extra->soft.n;
            for (long e = 0; e < s.value_width; ++e) beside[e] = apart[i * w.values.padded + e] * inverse;
            if (FORM == 4)
              for (long e = 0; e < s.value_width; ++e) at[e] += beside[e];
          }
        }
      }
    }
  });
  return 0;
} catch (...) {
  return 1;
}

// `result` is the output, or the second one
int kart_backward(const Shape* shape, const float* options, const Strided* q, const Strided* k, const Strided* v,
                  const Mask* mask, const Extra* extra, int own, float scale, const Strided* dout,
                  const Strided* result, const Room* dq, const Room* dk, const Room* dv, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const Slots slots(order, threads);
  const long size = extra->size;
  Buffer found(slots.count * size);
  spread(order.count(), threads, [&](int thread, long begin, long end) {
    const Tiles tiles;
    Scratch w(s, size, true);
    long head = -1;
    float* sum = nullptr;
    for (long task = begin; task < end; ++task) {
      const long b = order.b(task), h = order.h(task);
      if (order.head(task) != head) {
        head = order.head(task);
        sum = found + slots.slot(thread, head) * size;
        std::fill(sum, sum + size, 0.0f);
      }
      const Entry entry(options, extra->theta + head * size, w.room, size, s.keys, sum);
      vec sums[Entry::P];
      for (int i = 0; i < Entry::P; ++i) sums[i] = vec{};
      w.keys.take(*k, k->at(b, h), 1.0f);
      w.values.take(*v, v->at(b, h), 1.0f);
      std::fill(w.dk.data, w.dk.data + w.keys.whole * w.keys.padded, 0.0f);
      std::fill(w.dv.data, w.dv.data + w.values.whole * w.values.padded, 0.0f);
      for (long n = 0; n < s.queries; n += LANES) {
        const long queries = std::min<long>(LANES, s.queries - n), row = (b * s.heads + h) * s.queries + n;
        w.queries.take(*q, q->at(b, h) + n * q->n, queries, scale);
        w.douts.take(*dout, dout->at(b, h) + n * dout->n, queries, 1.0f);
        const float* out = FORM > 0 ? result->at(b, h) + n * result->n : nullptr;
        for (long i = 0; i < LANES; ++i) {
          const bool wanted = FORM > 0 && i < queries;
          const float* third = SIMPLEX ? extra->low : extra->factor;
          const float c = i < queries && third ? third[row + i] : 1.0f;
          w.rows[i] = FORM == 0 ? c : i < queries ? extra->statistic[row + i] : SOFT || SIMPLEX ? INFINITY : 1.0f;
          w.rows[LANES + i] =
              wanted ? dot(w.douts.rows() + i * w.douts.padded, out + i * result->n, result->d, s.value_width) : 0.0f;
          w.rows[2 * LANES + i] = c;
        }
        std::fill(w.dq.data, w.dq.data + w.keys.padded * LANES, 0.0f);
        const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
        if (queries > W)
          backward_block<2>(entry, s, w, sums, mask_at, *mask, n, queries);
        else
          backward_block<1>(entry, s, w, sums, mask_at, *mask, n, queries);
        const float* own = w.keys.lane_rows(w.dq, w.turned);
        float* at = dq->at(b, h) + n * dq->n;
        for (long i = 0; i < queries; ++i, at += dq->n)
          for (long c = 0; c < s.width; ++c) at[c] = scale * own[i * w.keys.padded + c];
      }
      entry.finish(sums, sum, size);
      float* at = dk->at(b, h);
      for (long m = 0; m < s.keys; ++m, at += dk->n) std::memcpy(at, w.dk + m * w.keys.padded, 4 * s.width);
      at = dv->at(b, h);
      for (long m = 0; m < s.keys; ++m, at += dv->n)
        std::memcpy(at, w.dv + m * w.values.padded, 4 * s.value_width);
    }
  });
  slots.collect(found, size, [&](long head, const float* sum, bool fresh) {
    float* out = extra->dtheta + head * size;
    for (long i = 0; i < size; ++i) out[i] = sum[i] + (fresh ? 0.0f : out[i]);
  });
  return 0;
} catch (...) {
  return 1;
}

}  // extern "C"
