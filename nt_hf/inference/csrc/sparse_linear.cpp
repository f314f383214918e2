// y = x W^T + bias for a sparse W on a CPU: W in compressed rows, x of few or many rows ("tokens").
//
// A column takes one byte: its distance from the column before. A distance over 255 is covered by entries of value 0 on
// the way, which are rare: at density 0.1 there are none, at 0.01 one weight in thirteen needs one.
//
// A weight is read once and multiplies the same input of 8, 16 or 32 tokens, which lie beside each other in a transposed
// copy of x. One token takes a plain sparse dot product. Sums are fp32. Vectors are the compiler's own, so that one
// source serves every CPU; whoever calls it gives -march.
//
// The OpenMP runtime is the one that the process has loaded already, PyTorch's.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// Bytes of a vector register. Wider vectors would live in memory, which makes them twenty times as slow.
#if defined(__AVX512F__)
constexpr int64_t REGISTER = 64;
#elif defined(__AVX__)
constexpr int64_t REGISTER = 32;
#else
constexpr int64_t REGISTER = 16;
#endif
typedef float Floats __attribute__((vector_size(REGISTER), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(REGISTER), aligned(4)));

constexpr int64_t LANES = 16;
// The indices and weights of so many bytes ahead are asked for early: a CPU foresees no stream broken by random reads.
constexpr int64_t AHEAD = 2048;

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline void store(float value, float* target) { *target = value; }
inline void store(float value, BFloat16* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
  target->bits = value == value ? rounded : 0x7fc0;
}

struct alignas(64) Line {
  uint32_t words[LANES];
};

inline void transpose(Line (&block)[LANES]) {
#if defined(__AVX512F__)
  // Four times every word of the first half is followed by its partner of the second.
  Words lines[LANES];
  std::memcpy(lines, block, sizeof(block));
  for (int pass = 0; pass < 4; pass++) {
    Words next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      const Words a = lines[i], b = lines[i + LANES / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::memcpy(lines, next, sizeof(next));
  }
  std::memcpy(block, lines, sizeof(block));
#else
  for (int64_t i = 0; i < LANES; i++)
    for (int64_t j = 0; j < i; j++) std::swap(block[i].words[j], block[j].words[i]);
#endif
}

// How the inputs of a tile's tokens lie in the transposed copy, and what a weight does with them.
//
// TOKENS: of a tile. STRIDE: words of the copy a column. UNROLL: weights of a row under way at a time, each with its own
// sums, because an addition waits for the one before it.

// 8, 16 or 32 tokens in fp32.
template <int64_t TOKENS_>
struct Wide {
  static constexpr int64_t TOKENS = TOKENS_, STRIDE = TOKENS;
  static constexpr int64_t BYTES = std::min<int64_t>(REGISTER, TOKENS * sizeof(float));
  static constexpr int VECTORS = TOKENS * sizeof(float) / BYTES, UNROLL = 8 / VECTORS;
  typedef float Word;
  struct Sums {
    typedef float Vector __attribute__((vector_size(BYTES), aligned(4)));
    Vector sum[VECTORS]{};
    void add(const float* x, float weight) {
#pragma GCC unroll 8
      for (int k = 0; k < VECTORS; k++) sum[k] += *(const Vector*)(x + BYTES / 4 * k) * weight;
    }
    void add(const Sums& other) {
      for (int k = 0; k < VECTORS; k++) sum[k] += other.sum[k];
    }
    void write(float* target) const { std::memcpy(target, sum, sizeof(sum)); }
  };
  template <class T>
  static void gather(const T* x, int64_t tokens, int64_t in, int64_t column, int64_t count, float* target) {
    if constexpr (TOKENS < LANES) {
      for (int64_t j = 0; j < count; j++)
        for (int64_t t = 0; t < TOKENS; t++)
          target[j * STRIDE + t] = t < tokens ? to_float(x[t * in + column + j]) : 0.0f;
    } else {
      for (int64_t first = 0; first < TOKENS; first += LANES) {
        Line block[LANES]{};
        for (int64_t t = 0; t < std::min(LANES, tokens - first); t++) {
          float row[LANES]{};
          for (int64_t j = 0; j < count; j++) row[j] = to_float(x[(first + t) * in + column + j]);
          std::memcpy(&block[t], row, sizeof(row));
        }
        transpose(block);
        for (int64_t j = 0; j < count; j++) std::memcpy(target + j * STRIDE + first, &block[j], sizeof(Line));
      }
    }
  }
};

// 32 tokens in bf16, half the memory to read: token t in the low half of word t, token t + 16 in its high half.
struct Packed {
  static constexpr int64_t TOKENS = 32, STRIDE = LANES;
  static constexpr int VECTORS = LANES * sizeof(float) / REGISTER, UNROLL = 4 / VECTORS;
  typedef uint32_t Word;
  struct Sums {
    Floats low[VECTORS]{}, high[VECTORS]{};
    void add(const uint32_t* x, float weight) {
#pragma GCC unroll 4
      for (int k = 0; k < VECTORS; k++) {
        const Words words = *(const Words*)(x + REGISTER / 4 * k);
        low[k] += (Floats)(words << 16) * weight;
        high[k] += (Floats)(words & 0xffff0000u) * weight;
      }
    }
    void add(const Sums& other) {
      for (int k = 0; k < VECTORS; k++) {
        low[k] += other.low[k];
        high[k] += other.high[k];
      }
    }
    void write(float* target) const {
      std::memcpy(target, low, sizeof(low));
      std::memcpy(target + LANES, high, sizeof(high));
    }
  };
  static void gather(const BFloat16* x, int64_t tokens, int64_t in, int64_t column, int64_t count, uint32_t* target) {
    Line block[LANES]{};
    for (int64_t t = 0; t < std::min(LANES, tokens); t++) {
      const BFloat16 *low = x + t * in + column, *high = low + LANES * in;
      uint32_t row[LANES]{};
      for (int64_t j = 0; j < count; j++) row[j] = low[j].bits;
      if (t + LANES < tokens)
        for (int64_t j = 0; j < count; j++) row[j] |= uint32_t(high[j].bits) << 16;
      std::memcpy(&block[t], row, sizeof(row));
    }
    transpose(block);
    for (int64_t j = 0; j < count; j++) std::memcpy(target + j * STRIDE, &block[j], sizeof(Line));
  }
};

template <class T>
struct Weight {
  const int64_t* rows;   // [out + 1], where each row begins
  const uint8_t* steps;  // [entries], from the column before; a row starts at column 0
  const T* values;       // [entries]
  const float* bias;     // [out] or null
  int64_t out, in;
};

template <class T>
inline void prefetch(const Weight<T>& w, int64_t entry) {
  __builtin_prefetch((const char*)(w.values + entry) + AHEAD);
  __builtin_prefetch((const char*)(w.steps + entry) + AHEAD / 4);
}

// Scalar loads: a gather would need all columns as running sums in a vector, which takes twice the time.
template <class T>
void one_token(const Weight<T>& w, const T* x, T* y, float* copy, int threads) {
  for (int64_t j = 0; j < w.in; j++) copy[j] = to_float(x[j]);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
  for (int64_t row = 0; row < w.out; row++) {
    constexpr int64_t SUMS = 8;
    float sums[SUMS]{};
    const float* at = copy;
    int64_t p = w.rows[row];
    const int64_t end = w.rows[row + 1];
    for (; p + LANES <= end; p += LANES) {
      prefetch(w, p);
      float values[LANES];
      for (int64_t i = 0; i < LANES; i++) values[i] = to_float(w.values[p + i]);
      // Of every four weights only the last one's column is waited for.
#pragma GCC unroll 4
      for (int64_t i = 0; i < LANES; i += 4) {
        const uint8_t* steps = w.steps + p + i;
        const int64_t a = steps[0], b = a + steps[1], c = b + steps[2], d = c + steps[3];
        sums[i % SUMS] += values[i] * at[a];
        sums[i % SUMS + 1] += values[i + 1] * at[b];
        sums[i % SUMS + 2] += values[i + 2] * at[c];
        sums[i % SUMS + 3] += values[i + 3] * at[d];
        at += d;
      }
    }
    for (; p < end; p++) {
      at += w.steps[p];
      sums[0] += to_float(w.values[p]) * *at;
    }
    float sum = w.bias ? w.bias[row] : 0;
    for (float part : sums) sum += part;
    store(sum, y + row);
  }
}

template <class Tile, class T>
inline void one_row(const Weight<T>& w, int64_t row, const typename Tile::Word* copy, float* target) {
  typename Tile::Sums sums[Tile::UNROLL];
  int64_t column = 0;
  int64_t p = w.rows[row];
  const int64_t end = w.rows[row + 1];
  for (; p + Tile::UNROLL <= end; p += Tile::UNROLL) {
    prefetch(w, p);
#pragma GCC unroll 8
    for (int u = 0; u < Tile::UNROLL; u++) {
      column += w.steps[p + u];
      sums[u].add(copy + column * Tile::STRIDE, to_float(w.values[p + u]));
    }
  }
  for (; p < end; p++) {
    column += w.steps[p];
    sums[0].add(copy + column * Tile::STRIDE, to_float(w.values[p]));
  }
#pragma GCC unroll 8
  for (int u = 1; u < Tile::UNROLL; u++) sums[0].add(sums[u]);
  sums[0].write(target);
}

// Sums of 16 rows for a tile's tokens, `sums` [16, TOKENS], into y [tokens, out].
template <class Tile, class T>
void scatter(const Weight<T>& w, int64_t row, int64_t count, const float* sums, int64_t tokens, T* y) {
  float bias[LANES]{};
  if (w.bias) std::memcpy(bias, w.bias + row, count * sizeof(float));
  for (int64_t first = 0; first < tokens; first += LANES) {
    constexpr size_t width = std::min(LANES, Tile::TOKENS) * sizeof(float);
    Line block[LANES]{};
    for (int64_t i = 0; i < LANES; i++) std::memcpy(&block[i], sums + i * Tile::TOKENS + first, width);
    transpose(block);
    for (int64_t t = first; t < std::min(tokens, first + LANES); t++) {
      float values[LANES];
      std::memcpy(values, &block[t - first], sizeof(values));
      for (int64_t i = 0; i < count; i++) store(values[i] + bias[i], y + t * w.out + row + i);
    }
  }
}

template <class Tile, class T>
void one_tile(const Weight<T>& w, const T* x, T* y, int64_t tokens, void* scratch, int threads) {
  auto* copy = (typename Tile::Word*)scratch;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t column = 0; column < w.in; column += LANES)
      Tile::gather(x, tokens, w.in, column, std::min(LANES, w.in - column), copy + column * Tile::STRIDE);
#pragma omp for schedule(dynamic, 2)
    for (int64_t row = 0; row < w.out; row += LANES) {
      const int64_t count = std::min(LANES, w.out - row);
      alignas(64) float sums[LANES * Tile::TOKENS]{};
      for (int64_t i = 0; i < count; i++) one_row<Tile>(w, row + i, copy, sums + i * Tile::TOKENS);
      scatter<Tile>(w, row, count, sums, tokens, y);
    }
  }
}

template <class T>
void linear(const Weight<T>& w, const T* x, T* y, int64_t tokens, void* scratch, int threads) {
  typedef typename std::conditional<std::is_same<T, float>::value, Wide<32>, Packed>::type Most;
  for (int64_t step; tokens > 0; tokens -= step, x += step * w.in, y += step * w.out) {
    step = std::min(tokens, Most::TOKENS);
    if (step == 1)
      one_token(w, x, y, (float*)scratch, threads);
    else if (step <= Wide<8>::TOKENS)
      one_tile<Wide<8>>(w, x, y, step, scratch, threads);
    else if (step <= Wide<16>::TOKENS)
      one_tile<Wide<16>>(w, x, y, step, scratch, threads);
    else
      one_tile<Most>(w, x, y, step, scratch, threads);
  }
}

// Compressed rows of a mask's bits `mask` [out, ceil(in / 8)] and the values inside it, row after row. Without `steps`
// only `rows` is written, whose last number says how many entries there will be.
template <class Word>
void compress(const uint8_t* mask, const Word* values, int64_t out, int64_t in, int64_t* rows, uint8_t* steps,
              Word* target) {
  const int64_t bytes = (in + 7) / 8;
  int64_t entry = 0;
  auto add = [&](uint8_t step, auto value) {
    if (steps) {
      steps[entry] = step;
      target[entry] = value();
    }
    entry++;
  };
  rows[0] = 0;
  for (int64_t row = 0; row < out; row++) {
    int64_t before = 0;
    for (int64_t byte = 0; byte < bytes; byte++, mask++)
      for (unsigned bits = *mask; bits; bits &= bits - 1) {
        const int64_t column = byte * 8 + __builtin_ctz(bits);
        for (; column - before > 255; before += 255) add(255, [] { return Word(0); });
        add(uint8_t(column - before), [&] { return *values++; });
        before = column;
      }
    rows[row + 1] = entry;
  }
}

// The dense rows `chosen` [count] into target [count, in].
template <class Word>
void expand(const int64_t* rows, const uint8_t* steps, const Word* values, const int64_t* chosen, int64_t count,
            int64_t in, Word* target) {
  std::memset(target, 0, count * in * sizeof(Word));
  for (int64_t i = 0; i < count; i++) {
    Word* at = target + i * in;
    for (int64_t p = rows[chosen[i]]; p < rows[chosen[i] + 1]; p++) *(at += steps[p]) = values[p];
  }
}

#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
#define BITMAPS

// W as a bit for every weight, and the active values. One instruction spreads the values of 32 columns to their places,
// so that nothing is looked up; the zeros are multiplied, too. That pays for few tokens.
struct Bitmap {
  const int64_t* rows;    // [out], where the values of each row begin
  const uint32_t* bits;   // [out, chunks], of 32 columns each
  const BFloat16* values; // with 64 bytes behind them that may be read
  const float* bias;      // [out] or null
  int64_t out, chunks;
};

// ROWS rows by TOKENS tokens. Several rows at a time hide how long the bits of one take to say where the values of its
// next 32 columns begin.
template <int ROWS, int TOKENS>
inline void spread_rows(const Bitmap& w, int64_t row, const BFloat16* x, BFloat16* y) {
  constexpr int64_t EVERY = 4;  // chunks a prefetch
  const BFloat16* values[ROWS];
  const BFloat16* first[ROWS];
  const BFloat16* next[ROWS];  // the same place of the rows after these, which no other stream would load early enough
  const uint32_t* bits = w.bits + row * w.chunks;
  __m512 sums[ROWS][TOKENS];
  for (int r = 0; r < ROWS; r++) {
    values[r] = first[r] = w.values + w.rows[row + r];
    next[r] = w.values + w.rows[std::min(row + r + ROWS, w.out - 1)];
    for (int t = 0; t < TOKENS; t++) sums[r][t] = _mm512_setzero_ps();
  }
  auto chunk = [&](int64_t c) {
    __m512bh spread[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const uint32_t places = bits[r * w.chunks + c];
      spread[r] = (__m512bh)_mm512_maskz_expand_epi16(places, _mm512_loadu_si512(values[r]));
      values[r] += __builtin_popcount(places);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) {
      const auto inputs = (__m512bh)_mm512_loadu_si512(x + (t * w.chunks + c) * 32);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], spread[r], inputs);
    }
  };
  int64_t c = 0;
  for (; c + EVERY <= w.chunks; c += EVERY) {
    for (int r = 0; r < ROWS; r++) __builtin_prefetch(next[r] + (values[r] - first[r]));
    __builtin_prefetch(bits + (ROWS + c / EVERY % ROWS) * w.chunks + c);
#pragma GCC unroll 4
    for (int64_t k = 0; k < EVERY; k++) chunk(c + k);
  }
  for (; c < w.chunks; c++) chunk(c);
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++)
      store(_mm512_reduce_add_ps(sums[r][t]) + (w.bias ? w.bias[row + r] : 0), y + t * w.out + row + r);
}

template <int TOKENS>
void few_tokens(const Bitmap& w, const BFloat16* x, BFloat16* y, int threads) {
  constexpr int64_t ROWS = 4;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
  for (int64_t row = 0; row < w.out; row += ROWS) {
    if (row + ROWS <= w.out) {
      spread_rows<ROWS, TOKENS>(w, row, x, y);
    } else {
      for (int64_t rest = row; rest < w.out; rest++) spread_rows<1, TOKENS>(w, rest, x, y);
    }
  }
}

// scratch [4, chunks * 32]: four tokens' inputs, with zeros behind them.
void spread_linear(const Bitmap& w, const BFloat16* x, BFloat16* y, int64_t tokens, int64_t in, BFloat16* scratch,
                   int threads) {
  for (int64_t step; tokens > 0; tokens -= step, x += step * in, y += step * w.out) {
    step = std::min<int64_t>(tokens, 4);
    std::memset(scratch, 0, step * w.chunks * 32 * sizeof(BFloat16));
    for (int64_t t = 0; t < step; t++) std::memcpy(scratch + t * w.chunks * 32, x + t * in, in * sizeof(BFloat16));
    decltype(&few_tokens<1>) multiply[] = {few_tokens<1>, few_tokens<2>, few_tokens<3>, few_tokens<4>};
    multiply[step - 1](w, scratch, y, threads);
  }
}

// The dense rows `chosen` [count] into target [count, in].
void spread_to(const Bitmap& w, const int64_t* chosen, int64_t count, int64_t in, BFloat16* target, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    const BFloat16* values = w.values + w.rows[chosen[i]];
    for (int64_t c = 0; c < w.chunks; c++) {
      const uint32_t bits = w.bits[chosen[i] * w.chunks + c];
      const uint32_t inside = in - c * 32 < 32 ? (1u << (in - c * 32)) - 1 : ~0u;
      const __m512i spread = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
      _mm512_mask_storeu_epi16(target + i * in + c * 32, inside, spread);
      values += __builtin_popcount(bits);
    }
  }
}
#endif

}  // namespace

// x [tokens, in], y [tokens, out], contiguous. scratch: in * 128 bytes, the same for all sizes and types.
#define DEFINE(name, T)                                                                                             \
  extern "C" void name(const int64_t* rows, const uint8_t* steps, const T* values, const float* bias, const T* x, T* y, \
                       void* scratch, int64_t tokens, int64_t out, int64_t in, int64_t threads) {                     \
    linear(Weight<T>{rows, steps, values, bias, out, in}, x, y, tokens, scratch, int(threads));                       \
  }
DEFINE(sparse_linear_float32, float)
DEFINE(sparse_linear_bfloat16, BFloat16)

// Of values of 2 or 4 bytes, whatever they mean.
#define DEFINE_FORMS(bytes, Word)                                                                                   \
  extern "C" void compress_##bytes(const uint8_t* mask, const Word* values, int64_t out, int64_t in, int64_t* rows,   \
                                   uint8_t* steps, Word* target) {                                                    \
    compress(mask, values, out, in, rows, steps, target);                                                             \
  }                                                                                                                   \
  extern "C" void expand_##bytes(const int64_t* rows, const uint8_t* steps, const Word* values, const int64_t* chosen, \
                                 int64_t count, int64_t in, Word* target) {                                           \
    expand(rows, steps, values, chosen, count, in, target);                                                           \
  }
DEFINE_FORMS(2, uint16_t)
DEFINE_FORMS(4, uint32_t)

#ifdef BITMAPS
// x [tokens, in], y [tokens, out], contiguous.
extern "C" void bitmap_linear(const int64_t* rows, const uint32_t* bits, const BFloat16* values, const float* bias,
                              const BFloat16* x, BFloat16* y, BFloat16* scratch, int64_t tokens, int64_t out, int64_t in,
                              int64_t threads) {
  spread_linear(Bitmap{rows, bits, values, bias, out, (in + 31) / 32}, x, y, tokens, in, scratch, int(threads));
}
extern "C" void bitmap_expand(const int64_t* rows, const uint32_t* bits, const BFloat16* values, const int64_t* chosen,
                              int64_t count, int64_t out, int64_t in, BFloat16* target, int64_t threads) {
  spread_to(Bitmap{rows, bits, values, nullptr, out, (in + 31) / 32}, chosen, count, in, target, int(threads));
}
// Where the values of each row begin, rows [out], by its bits [out, chunks].
extern "C" void bitmap_rows(const uint32_t* bits, int64_t out, int64_t chunks, int64_t* rows) {
  int64_t before = 0;
  for (int64_t row = 0; row < out; row++) {
    rows[row] = before;
    for (int64_t c = 0; c < chunks; c++) before += __builtin_popcount(*bits++);
  }
}
#endif
