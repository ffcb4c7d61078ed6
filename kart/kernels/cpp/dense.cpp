// Full rank: the coefficients of P tokens, J = M K numbers each, and the values of those tokens,
//   mixed[c, j] = sum_p v[p, c] C[p, j],
// and its gradients, on the tile unit where there is one and the numbers fit it. What it computes is held against
// kart/kernels/stream.py.

#include <memory>

#include "operands.h"

// of the shape, `queries` is P, `keys` is J and `value_width` the number of columns c
constexpr int NO_MEMORY = 1;

// tokens, numbers of each and columns from which on the tile unit is the faster
constexpr long WORTH = 64;
static bool worth_tiles(const Shape& s) { return granted() && std::min({s.queries, s.keys, s.value_width}) >= WORTH; }

// numbers of a token that all samples of a head meet before the next: as operands they stay in the level-2 cache
constexpr long GROUP = 256;

static long tiles_of(long x) { return round_up(x, SIDE) / SIDE; }

// the heads and groups, each with all samples that share the coefficients
struct Groups {
  Order order;
  long each;
  Coefs coefs;
  Groups(const Shape& s, bool own, const Coefs& c) : order(s, own), each(round_up(s.keys, GROUP) / GROUP), coefs(c) {}
  long count() const { return order.heads * each; }
  long head(long task) const { return task / each; }
  long first(long task) const { return task % each * GROUP; }
  // of sample i of a head
  long b(long head, long i) const { return order.b(head * order.batch + i); }
  long h(long head) const { return order.h(head * order.batch); }
  // the coefficients of a group
  template <bool RIGHT>
  void take(Matrix<RIGHT>& to, const Shape& s, long task) const {
    to.width = std::min(GROUP, s.keys - first(task));
    const float* at = coefs_at(coefs, order, head(task) * order.batch) + first(task);
    to.take({coefs.data, coefs.b, coefs.h, coefs.p, 1}, at, s.queries, 1.0f);
  }
};

// the values of all samples of a head
struct Values {
  std::vector<std::unique_ptr<Matrix<false>>> of;
  bool tiles = true;
  Values(const Shape& s, long samples, bool sums) {
    for (long i = 0; i < samples; ++i)
      of.push_back(std::make_unique<Matrix<false>>(s.queries, s.value_width, sums, worth_tiles(s), !sums));
  }
  void take(const Groups& groups, long head, const Strided& v, const Shape& s) {
    tiles = true;
    for (size_t i = 0; i < of.size(); ++i) {
      of[i]->take(v, v.at(groups.b(head, i), groups.h(head)), s.queries, 1.0f);
      tiles = tiles && of[i]->tiles;
    }
  }
};

extern "C" {

// C is (batch or 1, heads, P, J); mixed has room for whole tiles, J and c rounded up to 16
int kart_mixed(const Shape* shape, const Coefs* coefs, int own, const Strided* v, const Room* mixed, int threads) try {
  const Shape& s = *shape;
  const Groups groups(s, own, *coefs);
  threads = std::min<long>(threads, groups.count());
  spread(groups.count(), threads, [&](int, long begin, long end) {
    const Tiles unit;
    Matrix<true> matrix(s.queries, GROUP, true, worth_tiles(s), false);
    Values values(s, groups.order.batch, true);
    long head = -1;
    for (long task = begin; task < end; ++task) {
      if (groups.head(task) != head) {
        head = groups.head(task);
        values.take(groups, head, *v, s);
      }
      groups.take(matrix, s, task);
      for (long i = 0; i < groups.order.batch; ++i) {
        Matrix<false>& x = *values.of[i];
        float* out = mixed->at(groups.b(head, i), groups.h(head)) + groups.first(task);
        if (matrix.tiles && values.tiles)
          tile_gemm(tiles_of(s.value_width), tiles_of(matrix.width), x.whole / PAIRED,
                    {x.pairs, x.column_step(), x.exact}, {matrix.pairs, matrix.column_step(), matrix.exact}, out, mixed->n,
                    false);
        else
          wide_gemm<WIDE_ROWS, 1>(s.value_width, round_up(matrix.width, W), s.queries, x.rows(), x.padded, matrix.rows(),
                                  matrix.padded, out, mixed->n, false);
      }
    }
  });
  return 0;
} catch (...) {
  return NO_MEMORY;
}

// from the gradient of mixed those of v and of C, this contiguous
int kart_unmixed(const Shape* shape, const Coefs* coefs, int own, const Strided* v, const Strided* dmixed, const Room* dv,
                 float* dcoefs, int threads) try {
  const Shape& s = *shape;
  const Groups groups(s, own, *coefs);
  threads = std::min<long>(threads, groups.count());
  const long samples = groups.order.batch, rows = tiles_of(s.queries) * SIDE, columns = tiles_of(s.value_width) * SIDE;
  // of the values of a head a thread has the sum over the groups it meets
  Shape by_group = s;
  by_group.batch = groups.each;
  by_group.heads = groups.order.heads;
  const Order tasks(by_group, false);
  const Slots slots(tasks, threads);
  const long size = samples * rows * columns;
  Buffer sums(slots.count * size);
  std::fill(sums.data, sums.data + slots.count * size, 0.0f);
  spread(groups.count(), threads, [&](int thread, long begin, long end) {
    const Tiles unit;
    Matrix<false> matrix(s.queries, GROUP, false, worth_tiles(s));
    Matrix<true> pulled(s.value_width, GROUP, true, worth_tiles(s));
    Values values(s, samples, false);
    Buffer found(rows * GROUP), turned(GROUP * columns);
    long head = -1;
    for (long task = begin; task < end; ++task) {
      if (groups.head(task) != head) {
        head = groups.head(task);
        values.take(groups, head, *v, s);
      }
      groups.take(matrix, s, task);
      pulled.width = matrix.width;
      for (long i = 0; i < samples; ++i) {
        Matrix<false>& x = *values.of[i];
        const float* at = dmixed->at(groups.b(head, i), groups.h(head)) + groups.first(task) * dmixed->d;
        pulled.take(*dmixed, at, s.value_width, 1.0f);
        float* sum = sums + slots.slot(thread, head) * size + i * rows * columns;
        if (matrix.tiles && values.tiles && pulled.tiles) {
          tile_gemm(rows / SIDE, columns / SIDE, round_up(matrix.width, PAIRED) / PAIRED,
                    {matrix.columns, matrix.row_step(), matrix.exact}, {pulled.columns, pulled.row_step(), pulled.exact}, sum,
                    columns, true);
          tile_gemm(rows / SIDE, tiles_of(matrix.width), x.padded / PAIRED, {x.columns, x.row_step(), x.exact},
                    {pulled.pairs, pulled.column_step(), pulled.exact}, found, GROUP, i > 0);
          continue;
        }
        const long wide = round_up(s.value_width, W);
        transpose_matrix(pulled.rows(), pulled.padded, wide, round_up(matrix.width, W), turned, columns);
        wide_gemm<WIDE_ROWS, 0>(s.queries, wide, matrix.width, matrix.rows(), 1, turned, columns, sum, columns, true,
                                matrix.padded);
        wide_gemm<WIDE_ROWS, 0>(s.queries, round_up(matrix.width, W), s.value_width, x.rows(), 1, pulled.rows(), pulled.padded,
                                found, GROUP, i > 0, x.padded);
      }
      float* out = dcoefs + head * s.queries * s.keys + groups.first(task);
      for (long p = 0; p < s.queries; ++p) std::memcpy(out + p * s.keys, found + p * GROUP, 4 * matrix.width);
    }
  });
  slots.collect(sums, size, [&](long head, const float* sum, bool fresh) {
    for (long i = 0; i < samples; ++i) {
      float* out = dv->at(groups.b(head, i), groups.h(head));
      for (long p = 0; p < s.queries; ++p, out += dv->n, sum += columns)
        for (long c = 0; c < s.value_width; ++c) out[c] = fresh ? sum[c] : out[c] + sum[c];
      sum += (rows - s.queries) * columns;
    }
  });
  return 0;
} catch (...) {
  return NO_MEMORY;
}

}  // extern "C"
