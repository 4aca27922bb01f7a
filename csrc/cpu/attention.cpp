// A key head of a segment at a time: its keys and values are packed once, and queries go through in
// blocks, each against the keys that it sees. Compiled once for each ISA level.
#include "moekernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <utility>

#include "simd.h"
#include "vmath.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

template <class W>
inline void fill(W* begin, W* end, W value) {
  for (; begin != end; ++begin) *begin = value;
}

// Zeros, aligned to a line.
template <class W>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(W)) + 64) / 64 * 64;
    memory_ = static_cast<W*>(std::aligned_alloc(64, bytes));
    if (memory_ == nullptr) throw std::bad_alloc();
    fill(memory_, memory_ + count, W(0));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }
  W* data() { return memory_; }
  W& operator[](int64_t i) { return memory_[i]; }
  const W& operator[](int64_t i) const { return memory_[i]; }

 private:
  W* memory_;
};

// c [m, n vectors] = or += a [m, k] b [k, n vectors]; a's element (i, u) is a[i * am + u * ak].
template <class W>
struct Sides {
  const W* a;
  int64_t am, ak;
  const W* b;
  int64_t ldb;
  W* c;
  int64_t ldc;
};

template <class W, int MR, int NV>
inline void tile(int64_t k, const Sides<W>& s, bool add) {
  constexpr int lanes = kLanes<W>;
  Vec<W> sum[MR][NV] = {};
  for (int64_t u = 0; u < k; ++u) {
    Vec<W> b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = load(s.b + u * s.ldb + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec<W> a = splat<W>(s.a[i * s.am + u * s.ak]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[i][v] = sum[i][v] + a * b[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      W* at = s.c + i * s.ldc + v * lanes;
      store(at, add ? load(at) + sum[i][v] : sum[i][v]);
    }
  }
}

#if defined(MOEKERNELS_ISA_avx512)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 4;
#endif

template <class W, int NV, int... MR>
inline void tile_of(std::integer_sequence<int, MR...>, int64_t rows, int64_t k, const Sides<W>& s,
                    bool add) {
  using Fn = void(int64_t, const Sides<W>&, bool);
  static constexpr Fn* of[] = {&tile<W, MR + 1, NV>...};
  of[rows - 1](k, s, add);
}

// columns: a whole number of vectors.
template <class W>
void multiply(int64_t m, int64_t columns, int64_t k, const Sides<W>& s, bool add) {
  constexpr auto shapes = std::make_integer_sequence<int, kTileRows>{};
  constexpr int lanes = kLanes<W>;
  for (int64_t i = 0; i < m; i += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, m - i);
    const auto at = [&](int64_t j) {
      return Sides<W>{s.a + i * s.am, s.am, s.ak, s.b + j, s.ldb, s.c + i * s.ldc + j, s.ldc};
    };
    int64_t j = 0;
    for (; j + 2 * lanes <= columns; j += 2 * lanes) tile_of<W, 2>(shapes, rows, k, at(j), add);
    if (j < columns) tile_of<W, 1>(shapes, rows, k, at(j), add);
  }
}

template <class W>
int64_t padded(int64_t n) {
  return (n + kLanes<W> - 1) / kLanes<W> * kLanes<W>;
}

constexpr int64_t kQueries = 24;  // of a block: whole tiles

// One item's sides, in fp32 (fp64) and turned: rows [n, wide] of what a head holds.
template <class T>
struct Item {
  using W = Wide<T>;
  const AttentionArgs& of;
  int64_t kv, first, n, wide, keys;  // padded: of a row, and of all keys

  Item(const AttentionArgs& args, int64_t item)
      : of(args),
        kv(item % args.kv_heads),
        first(args.bounds[item / args.kv_heads]),
        n(args.bounds[item / args.kv_heads + 1] - first),
        wide(padded<W>(args.width)),
        keys(padded<W>(n)) {}

  int64_t row_width() const { return (of.heads + 2 * of.kv_heads) * of.width; }
  int64_t group() const { return of.heads / of.kv_heads; }
  int64_t key_head() const { return of.heads + kv; }
  int64_t value_head() const { return of.heads + of.kv_heads + kv; }
  const T* head(int64_t number, int64_t token) const {
    return static_cast<const T*>(of.qkv) + (first + token) * row_width() + number * of.width;
  }

  void read(int64_t number, int64_t token, W* to) const {
    const T* from = head(number, token);
    for_vectors<W>(of.width, [&](int64_t j, auto c) { store(to + j, load(from + j, c), c); });
    fill(to + of.width, to + wide, W(0));
  }
  // Turn a row by its token's angles, or back.
  void turn(int64_t token, W* row, W way) const {
    const W* cos = static_cast<const W*>(of.cos) + (first + token) * of.half;
    const W* sin = static_cast<const W*>(of.sin) + (first + token) * of.half;
    W* other = row + of.half;
    for_vectors<W>(of.half, [&](int64_t j, auto c) {
      const Vec<W> a = load(row + j, c), b = load(other + j, c);
      const Vec<W> x = load(cos + j, c), y = load(sin + j, c) * way;
      store(row + j, a * x - b * y, c);
      store(other + j, b * x + a * y, c);
    });
  }
  // As queries or keys enter the scores: over their root mean square, where that is wanted, and
  // turned.
  void read_turned(int64_t number, int64_t token, const void* weights, W* to) const {
    read(number, token, to);
    if (weights != nullptr) {
      const W rstd = rstd_of(to);
      const T* weight = static_cast<const T*>(weights);
      for_vectors<W>(of.width, [&](int64_t j, auto c) {
        store(to + j, load(to + j, c) * rstd * load(weight + j, c), c);
      });
    }
    turn(token, to, 1);
  }
  // The gradient of such a row becomes that of what was read; the weight's is added to dweight.
  void back(int64_t number, int64_t token, const void* weights, W* row, W* raw, W* dweight) const {
    turn(token, row, -1);
    if (weights == nullptr) return;
    read(number, token, raw);
    const W rstd = rstd_of(raw);
    const T* weight = static_cast<const T*>(weights);
    Vec<W> dot{};
    for_vectors<W>(of.width, [&](int64_t j, auto c) {
      const Vec<W> product = load(row + j, c) * (load(raw + j, c) * rstd);
      store(dweight + j, load(dweight + j, c) + product, c);
      dot = dot + product * load(weight + j, c);
    });
    const W mean = sum_lanes<W>(dot) / static_cast<W>(of.width);
    for_vectors<W>(of.width, [&](int64_t j, auto c) {
      const Vec<W> hat = load(raw + j, c) * rstd;
      store(row + j, (load(row + j, c) * load(weight + j, c) - hat * mean) * rstd, c);
    });
  }
  // Of a row that ends in zeros.
  W rstd_of(const W* row) const {
    Vec<W> squares{};
    for (int64_t j = 0; j < wide; j += kLanes<W>) squares = squares + load(row + j) * load(row + j);
    const W mean = sum_lanes<W>(squares) / static_cast<W>(of.width);
    return 1 / std::sqrt(mean + static_cast<W>(of.eps));
  }
  // rows [n, wide] -> [wide, keys]
  void transpose(const Buffer<W>& rows, Buffer<W>& to) const {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < of.width; ++j) to[j * keys + i] = rows[i * wide + j];
    }
  }
};

// The scores of queries [i0, i0 + count) become their exponentials over `shift` of each; keys that
// a query does not see, zero.
template <class W, class Shift, class Took>
void exponentials(W* scores, int64_t ld, int64_t i0, int64_t count, int64_t keys, W scale,
                  const Shift& shift, const Took& took) {
  for (int64_t r = 0; r < count; ++r) {
    W* row = scores + r * ld;
    fill(row + i0 + r + 1, row + keys, W(-INFINITY));
    const W down = shift(r, row);
    Vec<W> sums{};
    for (int64_t j = 0; j < keys; j += kLanes<W>) {
      const Vec<W> p = exp(load(row + j) * scale - down);
      store(row + j, p);
      sums = sums + p;
    }
    took(r, down, sum_lanes<W>(sums));
  }
}

template <class T>
void forward(const AttentionArgs& args, int64_t number) {
  using W = Wide<T>;
  const Item<T> item(args, number);
  const int64_t n = item.n, wide = item.wide, keys = item.keys;
  const W scale = static_cast<W>(args.scale);
  Buffer<W> rows(n * wide), keys_across(wide * keys), values(n * wide);
  for (int64_t i = 0; i < n; ++i) {
    item.read_turned(item.key_head(), i, item.of.k_weight, rows.data() + i * wide);
    item.read(item.value_head(), i, values.data() + i * wide);
  }
  item.transpose(rows, keys_across);
  Buffer<W> queries(kQueries * wide), scores(kQueries * keys), out(kQueries * wide);
  W sums[kQueries];
  for (int64_t g = 0; g < item.group(); ++g) {
    const int64_t head = item.kv * item.group() + g;
    for (int64_t i0 = 0; i0 < n; i0 += kQueries) {
      const int64_t count = std::min(kQueries, n - i0), seen = padded<W>(i0 + count);
      for (int64_t r = 0; r < count; ++r)
        item.read_turned(head, i0 + r, item.of.q_weight, queries.data() + r * wide);
      multiply<W>(count, seen, args.width,
                  {queries.data(), wide, 1, keys_across.data(), keys, scores.data(), keys}, false);
      const auto largest = [&](int64_t, const W* row) {
        Vec<W> most = load(row);
        for (int64_t j = kLanes<W>; j < seen; j += kLanes<W>) {
          const Vec<W> x = load(row + j);
          most = x > most ? x : most;
        }
        return max_lanes<W>(most) * scale;
      };
      exponentials<W>(scores.data(), keys, i0, count, seen, scale, largest,
                      [&](int64_t r, W down, W sum) {
        sums[r] = sum;
        static_cast<W*>(args.lse)[head * args.tokens + item.first + i0 + r] = down + std::log(sum);
      });
      multiply<W>(count, wide, i0 + count,
                  {scores.data(), keys, 1, values.data(), wide, out.data(), wide}, false);
      for (int64_t r = 0; r < count; ++r) {
        T* to =
            static_cast<T*>(args.out) + ((item.first + i0 + r) * args.heads + head) * args.width;
        const W* from = out.data() + r * wide;
        for_vectors<W>(args.width,
                       [&](int64_t j, auto c) { store(to + j, load(from + j) / sums[r], c); });
      }
    }
  }
}

template <class T>
void backward(const AttentionBackwardArgs& args, int64_t number) {
  using W = Wide<T>;
  const AttentionArgs& of = args.of;
  const Item<T> item(of, number);
  const int64_t n = item.n, wide = item.wide, keys = item.keys;
  const W scale = static_cast<W>(of.scale);
  Buffer<W> rows(n * wide), values(n * wide);
  Buffer<W> keys_across(wide * keys), values_across(wide * keys);
  for (int64_t i = 0; i < n; ++i) {
    item.read_turned(item.key_head(), i, item.of.k_weight, rows.data() + i * wide);
    item.read(item.value_head(), i, values.data() + i * wide);
  }
  item.transpose(rows, keys_across);
  item.transpose(values, values_across);
  Buffer<W> dkeys(n * wide), dvalues(n * wide);
  Buffer<W> queries(kQueries * wide), dout(kQueries * wide), dqueries(kQueries * wide);
  Buffer<W> p(kQueries * keys), ds(kQueries * keys);
  W deltas[kQueries];
  // Of both weights; those of a run without are never read.
  Buffer<W> raw(wide), unused(2 * of.width);
  W* dweights = unused.data();
  if (args.dweights != nullptr) {
    dweights = static_cast<W*>(args.dweights) + number * 2 * of.width;
    fill(dweights, dweights + 2 * of.width, W(0));
  }
  const auto write = [&](int64_t head, int64_t token, const W* from) {
    T* to = static_cast<T*>(args.dqkv) + (item.first + token) * item.row_width() + head * of.width;
    for_vectors<W>(of.width, [&](int64_t j, auto c) { store(to + j, load(from + j), c); });
  };
  for (int64_t g = 0; g < item.group(); ++g) {
    const int64_t head = item.kv * item.group() + g;
    const W* lse = static_cast<const W*>(of.lse) + head * of.tokens + item.first;
    for (int64_t i0 = 0; i0 < n; i0 += kQueries) {
      const int64_t count = std::min(kQueries, n - i0), seen = padded<W>(i0 + count);
      for (int64_t r = 0; r < count; ++r) {
        item.read_turned(head, i0 + r, item.of.q_weight, queries.data() + r * wide);
        const int64_t at = ((item.first + i0 + r) * of.heads + head) * of.width;
        const T* d = static_cast<const T*>(args.dout) + at;
        const T* y = static_cast<const T*>(of.out) + at;
        W* to = dout.data() + r * wide;
        Vec<W> dot{};
        fill(to + of.width, to + wide, W(0));
        for_vectors<W>(of.width, [&](int64_t j, auto c) {
          const Vec<W> v = load(d + j, c);
          store(to + j, v, c);
          dot = dot + v * load(y + j, c);
        });
        deltas[r] = sum_lanes<W>(dot);
      }
      multiply<W>(count, seen, of.width,
                  {queries.data(), wide, 1, keys_across.data(), keys, p.data(), keys}, false);
      exponentials<W>(p.data(), keys, i0, count, seen, scale,
                      [&](int64_t r, const W*) { return lse[i0 + r]; }, [](int64_t, W, W) {});
      multiply<W>(count, seen, of.width,
                  {dout.data(), wide, 1, values_across.data(), keys, ds.data(), keys}, false);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t j = 0; j < seen; j += kLanes<W>) {
          W* at = ds.data() + r * keys + j;
          store(at, load(p.data() + r * keys + j) * (load(at) - deltas[r]) * scale);
        }
      }
      multiply<W>(count, wide, i0 + count,
                  {ds.data(), keys, 1, rows.data(), wide, dqueries.data(), wide}, false);
      multiply<W>(i0 + count, wide, count,
                  {ds.data(), 1, keys, queries.data(), wide, dkeys.data(), wide}, true);
      multiply<W>(i0 + count, wide, count,
                  {p.data(), 1, keys, dout.data(), wide, dvalues.data(), wide}, true);
      for (int64_t r = 0; r < count; ++r) {
        W* row = dqueries.data() + r * wide;
        item.back(head, i0 + r, of.q_weight, row, raw.data(), dweights);
        write(head, i0 + r, row);
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    W* row = dkeys.data() + i * wide;
    item.back(item.key_head(), i, of.k_weight, row, raw.data(), dweights + of.width);
    write(item.key_head(), i, row);
    write(item.value_head(), i, dvalues.data() + i * wide);
  }
}

}  // namespace

void attention(const AttentionArgs& args, int64_t item_begin, int64_t item_end) {
  with_storage(args.dtype, [&]<class T>(T) {
    for (int64_t i = item_begin; i < item_end; ++i) forward<T>(args, i);
  });
}

void attention_backward(const AttentionBackwardArgs& args, int64_t item_begin, int64_t item_end) {
  with_storage(args.of.dtype, [&]<class T>(T) {
    for (int64_t i = item_begin; i < item_end; ++i) backward<T>(args, i);
  });
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
