// What the compiled attentions multiply: a matrix whose rows all pass, and the block of LANES rows of another that they
// meet. Each product is the tile unit's where there is one, it is worth it and the numbers fit it, else the vector unit's.

#pragma once

#include "amx.h"
#include "tile.h"

// Rows of both matrices and their length from which the tile unit is the faster: each row is split once, for all it meets
constexpr long WORTH_ROWS = 128, WORTH_WIDTH = 64;
static bool worth(long rows, long others, long width) {
  return granted() && rows >= WORTH_ROWS && others >= WORTH_ROWS && width >= WORTH_WIDTH;
}

// to whole vectors, or pairs of tiles
static long padded_to(long x, bool unit) { return round_up(x, unit ? PAIRED : W); }

// The pieces of `rows` rows, up to 32, of the first COLUMNS of two vectors, `step` apart, times scale. Where given, `across` are the
// operands of sums over columns, of the first 16 rows and, `next_row` further, of the others, and `along` those of sums over
// rows, of the first 16 columns and, `next_column` further, of the others.
template <int COLUMNS>
static INLINE void split_block(const float* x, long step, long rows, float scale, Extent& extent, float* across,
                               long next_row, float* along, long next_column) {
  for (long n = 0; n < SIDE; ++n) {
    ivec piece[2][2][PIECES];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const long row = n + i * SIDE;
        // what lies beyond is what was there before
        const vec y = row < rows && v < COLUMNS ? load(x + row * step + v * SIDE) * scale : vec{};
        extent.see(y);
        split(y, piece[i][v]);
      }
    if (across)
      for (int i = 0; i < 2; ++i) store_pairs(across + i * next_row + n * SIDE, piece[i][0], piece[i][1]);
    if (along)
      for (int v = 0; v < COLUMNS; ++v) store_pairs(along + v * next_column + n * SIDE, piece[0][v], piece[1][v]);
  }
}

// rows of pairs to columns of pairs: what was the right side of a product becomes a left one, and the reverse
static void turn(float* operand) {
  for (int p = 0; p < PIECES; ++p) transpose(operand + p * PIECE, SIDE, operand + p * PIECE, SIDE);
}

// A matrix as operands: (block of 16 rows, step of 32 columns) for sums over its columns, these where `dots`, and (block of
// 16 columns, step of 32 rows) for sums over its rows, these where `sums`. RIGHT where it is the right side of its products.
template <bool RIGHT>
struct Matrix {
  long width, padded, whole;
  bool sums, dots, unit, tiles = false, exact = false;
  Buffer corner, columns, pairs;
  Matrix(long count, long columns_, bool sums_, bool unit_, bool dots_ = true)
      : width(columns_), padded(padded_to(columns_, unit_)), whole(padded_to(count, unit_)), sums(sums_), dots(dots_),
        unit(unit_), corner(unit ? PAIRED * PAIRED : 0), columns(unit && dots ? operands() : 0),
        pairs(unit && sums ? operands() : 0), packed(0) {}
  // floats of either kind
  long operands() const { return whole / SIDE * (padded / PAIRED) * OPERAND; }
  // floats from one block to the next
  long row_step() const { return padded / PAIRED * OPERAND; }
  long column_step() const { return whole / PAIRED * OPERAND; }

  // `count` rows times scale, which stay where they are until the next are taken
  void take(const Strided& x, const float* at, long count, float scale) {
    source = x;
    source.data = at;
    source_rows = count;
    source_scale = scale;
    ready = false;
    if (!unit) return;
    Extent extent;
    for (long r = 0; r < whole / PAIRED; ++r)
      for (long t = 0; t < padded / PAIRED; ++t) {
        const long some = std::min(PAIRED, count - r * PAIRED), wide = std::min(PAIRED, width - t * PAIRED);
        const float* from = at + r * PAIRED * x.n + t * PAIRED * x.d;
        if (some == PAIRED && wide == PAIRED && x.d == 1) {
          // rows lie far apart: the hardware sees no stream
          for (long i = 0; i < PAIRED; ++i) {
            __builtin_prefetch(from + (PAIRED + i) * x.n);
            __builtin_prefetch(from + (PAIRED + i) * x.n + SIDE);
          }
          take_block(r, t, from, x.n, scale, extent);
        } else {
          pack_rows(from, x.n, x.d, std::max(some, 0L), PAIRED, std::max(wide, 0L), PAIRED, scale, corner);
          take_block(r, t, corner, PAIRED, 1.0f, extent);
        }
      }
    tiles = extent.fits();
    exact = extent.whole();
  }
  void take_block(long r, long t, const float* from, long step, float scale, Extent& extent) {
    float *across = columns + 2 * r * row_step() + t * OPERAND, *along = pairs + 2 * t * column_step() + r * OPERAND;
    split_block<2>(from, step, PAIRED, scale, extent, dots ? across : nullptr, row_step(), sums ? along : nullptr,
                   column_step());
    for (int i = 0; i < 2; ++i) {
      if (RIGHT && dots) turn(across + i * row_step());
      if (!RIGHT && sums) turn(along + i * column_step());
    }
  }
  // the rows, `padded` floats each, zero beyond the last, for the vector unit
  const float* rows() {
    if (!ready) {
      packed.need((whole + PANEL) * padded);
      pack_rows(source.data, source.n, source.d, source_rows, whole + PANEL, width, padded, source_scale, packed);
      ready = true;
    }
    return packed;
  }

  // the same without a copy where whole vectors can be read of the rows as they lie, `step` apart
  const float* lying(long& step) {
    const bool lies = source.d == 1 && width % W == 0 && source_scale == 1.0f;
    step = lies ? source.n : padded;
    return lies ? source.data : rows();
  }

 private:
  Strided source;
  long source_rows;
  float source_scale;
  bool ready = false;
  Buffer packed;
};

// A block of up to LANES rows, in whose lanes the other matrix is met.
struct Lanes : Matrix<true> {
  long count = 0;
  bool turned = false;
  Buffer lanes;
  Lanes(long columns_, bool sums_, bool unit_) : Matrix<true>(LANES, columns_, sums_, unit_), lanes(0) {}
  void take(const Strided& x, const float* at, long rows_, float scale) {
    Matrix<true>::take(x, at, rows_, scale);
    count = rows_;
    turned = false;
  }
  // columns of lanes
  const float* as_lanes() {
    if (!turned) {
      lanes.need(padded * LANES);
      pack_lanes(rows(), padded, lanes);
      turned = true;
    }
    return lanes;
  }
};

// Entries of rows and lanes, LANES to a row, as operands of sums over both.
struct Between {
  long steps;
  bool unit, fit = true;
  Buffer columns, pairs;
  // room for `rows`
  Between(long rows, bool unit_)
      : steps(round_up(rows, PAIRED) / PAIRED), unit(unit_), columns(unit ? 2 * steps * OPERAND : 0),
        pairs(unit ? LANES / SIDE * steps * OPERAND : 0) {}
  // operands of sums over rows, and of sums over lanes if LANEWISE
  template <int V, bool LANEWISE>
  void take(const float* entries, long rows) {
    if (!unit) return;
    Extent extent;
    for (long t = 0; t < round_up(rows, PAIRED) / PAIRED; ++t)
      split_block<V>(entries + t * PAIRED * LANES, LANES, rows - t * PAIRED, 1.0f, extent,
                     LANEWISE ? columns + 2 * t * OPERAND : nullptr, OPERAND, pairs + t * OPERAND, steps * OPERAND);
    fit = extent.fits();
  }
};

// A matrix whose rows all pass.
struct Rows : Matrix<false> {
  long count;
  bool in_panels = false;
  Buffer panels;
  Rows(long count_, long columns_, bool sums_, bool unit_)
      : Matrix<false>(count_, columns_, sums_, unit_), count(count_), panels(0) {}
  void take(const Strided& x, const float* at, float scale) {
    Matrix<false>::take(x, at, count, scale);
    in_panels = false;
  }
  // out[row][lane] = the product of rows from `first` on, a multiple of 16 or of ROWS, and lanes; of tiles whole ones
  template <int V>
  void dots(Lanes& x, long first, int rows_, float* out) {
    if (tiles && x.tiles) {
      tile_gemm(round_up(rows_, SIDE) / SIDE, V, padded / PAIRED, {columns + first / SIDE * row_step(), row_step(), exact},
                {x.columns, x.row_step(), x.exact}, out, LANES, false);
      return;
    }
    if (!in_panels) {
      panels.need(panel_floats(count, padded));
      pack_panels(rows(), padded, count, panels);
      in_panels = true;
    }
    const float* lanes = x.as_lanes();
    for (int n = 0; n < rows_;) {
      // a first row within a panel: what is left of it
      const int within = (first + n) % ROWS, some = std::min(ROWS - within, rows_ - n);
      gemm<ROWS, V, 1>(some, width, panels + panel_floats(first + n - within, padded) + within, PANEL, lanes, LANES, out + n * LANES,
                       LANES, false);
      n += some;
    }
  }
  // The sum over `rows_` rows from `first` on, a multiple of 32, of entries[row][lane] and the row, for the first `lanes` of V
  // vectors: out[column][lane] on the tile unit, out[lane][column] elsewhere; see `lane_rows`.
  template <int V>
  void sum(const Between& between, const float* entries, long first, long rows_, int lanes, float* out, bool add) {
    if (tiles && between.fit) {
      tile_gemm(padded / SIDE, V, round_up(rows_, PAIRED) / PAIRED,
                {pairs + first / PAIRED * OPERAND, column_step(), exact},
                {between.pairs, between.steps * OPERAND, false}, out, LANES, add);
      return;
    }
    const float* from = rows() + first * padded;
    if (unit)
      gemm<ROWS, V, 1>(width, rows_, from, padded, entries, LANES, out, LANES, add);
    else
      wide_gemm<WIDE_ROWS, 1>(lanes, padded, rows_, entries, LANES, from, padded, out, padded, add);
  }
  // what `sum` left, as rows of `padded` floats, one of each lane; in `room` where they must be turned
  const float* lane_rows(const float* sums_, float* room) const {
    if (!unit) return sums_;
    for (long c = 0; c < padded; c += W)
      for (long i = 0; i < LANES; i += W) transpose(sums_ + c * LANES + i, LANES, room + i * padded + c, padded);
    return room;
  }
};

// out[row][column] += sum over the lanes of entries[row][lane] and the lane's row
static void sum_lanes(Lanes& x, const Between& between, const float* entries, int rows, float* out) {
  if (x.tiles && between.fit) {
    tile_gemm(round_up(rows, SIDE) / SIDE, x.padded / SIDE, 1, {between.columns, OPERAND, false},
              {x.pairs, x.column_step(), x.exact}, out, x.padded, true);
    return;
  }
  wide_gemm<WIDE_ROWS, LANES>(rows, x.padded, x.count, entries, 1, x.rows(), x.padded, out, x.padded);
}
