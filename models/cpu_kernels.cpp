// What packed_bert.py computes between BERT's linear layers, in one pass each; cpu_kernels.py compiles it.
//
// It needs AVX-512 with bf16. The products are oneDNN's, through PyTorch: in fp32, MKL's use only AVX2 on AMD.
// No result depends on the batch: attention takes ROWS of a sample's queries at a time and fills them up with zeros.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t LANES = 16;  // the values of a vector; the width of a row is a multiple of it
constexpr int64_t ROWS = 36;   // of queries in one product; 24, 32, 48 and 60 were slower

Vec widen(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }
Vec load(const float* from) { return Vec::loadu(from); }
Vec load(const BFloat16* from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
// Store `values` and return them as they are stored, which is rounded in bf16.
Vec store(Vec values, float* to) {
  values.store(to);
  return values;
}
Vec store(Vec values, BFloat16* to) {
  const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
  return widen(rounded);
}
float sum(Vec values) { return _mm512_reduce_add_ps(values); }

// An uninitialized buffer of `size` values.
template <typename T>
struct Buffer {
  Tensor tensor;
  T* values;
  explicit Buffer(int64_t size)
      : tensor(at::empty({size}, c10::CppTypeToScalarType<T>::value)), values(tensor.data_ptr<T>()) {}
  operator T*() const { return values; }
};

// Write `keys` (tokens, width), rows `stride` apart, as the right side (width, columns) of a product with the queries.
void pack_keys(const float* keys, int64_t stride, int64_t tokens, int64_t width, int64_t columns, float* to) {
  for (int64_t row = 0; row < width; ++row) std::fill(to + row * columns + tokens, to + (row + 1) * columns, 0.f);
  at::vec::transpose_mxn<float>(keys, stride, to, columns, static_cast<int>(tokens), static_cast<int>(width));
}
// In bf16 the two values of a pair stay side by side, as the product's instructions take them.
void pack_keys(const BFloat16* keys, int64_t stride, int64_t tokens, int64_t width, int64_t columns, BFloat16* to) {
  const auto pairs = reinterpret_cast<const float*>(keys);
  pack_keys(pairs, stride / 2, tokens, width / 2, columns, reinterpret_cast<float*>(to));
}

// Write `values` (tokens, width) as the right side (columns, width) of a product with the probabilities.
void pack_values(const float* values, int64_t stride, int64_t tokens, int64_t width, int64_t columns, float* to) {
  for (int64_t row = 0; row < tokens; ++row) std::copy_n(values + row * stride, width, to + row * width);
  std::fill(to + tokens * width, to + columns * width, 0.f);
}
void pack_values(const BFloat16* values, int64_t stride, int64_t tokens, int64_t width, int64_t columns, BFloat16* to) {
  at::vec::pack_vnni2(values, to, stride, tokens, width);
  std::fill(to + (tokens + tokens % 2) * width, to + columns * width, BFloat16(0.f));
}

// Write e to the power of each score, less the row's highest, to `to` (columns,); return the inverse of their sum, or
// NaN, as PyTorch's softmax does, if a score is NaN or the highest is infinite.
template <typename T>
float exponentials(float* scores, int64_t tokens, int64_t columns, T* to) {
  std::fill(scores + tokens, scores + columns, -INFINITY);
  Vec highest = load(scores);
  for (int64_t column = LANES; column < columns; column += LANES)
    highest = at::vec::maximum(highest, load(scores + column));
  const bool unknown = _mm512_cmp_ps_mask(highest, highest, _CMP_UNORD_Q) != 0;
  const float high = _mm512_reduce_max_ps(highest);
  highest = Vec(high);
  Vec sums(0.f);
  for (int64_t column = 0; column < columns; column += LANES)
    sums = sums + store((load(scores + column) - highest).exp_u20(), to + column);  // as they will be multiplied
  return unknown || std::isinf(high) ? NAN : 1 / sum(sums);
}

struct Block {
  int64_t start, tokens, head, first;  // of the sample: its first row and its tokens; the head; the first query
};

template <typename T>
void attend(const T* qkv, int64_t hidden, int64_t heads, const std::vector<Block>& blocks, int64_t longest, T* result) {
  constexpr bool pairs = std::is_same_v<T, BFloat16>;
  const int64_t width = hidden / heads, stride = 3 * hidden;
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    Buffer<T> queries(ROWS * width), keys(width * longest), values(longest * width), rounded(ROWS * longest);
    Buffer<float> scores(ROWS * longest), sums(ROWS * width);
    T* probabilities;
    if constexpr (pairs) probabilities = rounded; else probabilities = scores;
    for (int64_t index = begin; index < end; ++index) {
      const auto [start, tokens, head, first] = blocks[index];
      const int64_t columns = (tokens + LANES - 1) / LANES * LANES, rows = std::min(ROWS, tokens - first);
      const T* sample = qkv + start * stride + head * width;
      if (index == begin || first == 0) {
        pack_keys(sample + hidden, stride, tokens, width, columns, keys);
        pack_values(sample + 2 * hidden, stride, tokens, width, columns, values);
      }
      for (int64_t row = 0; row < rows; ++row)
        std::copy_n(sample + (first + row) * stride, width, queries + row * width);
      std::fill(queries + rows * width, queries + ROWS * width, T(0.f));
      at::native::cpublas::brgemm(ROWS, columns, width, width, columns, columns, false, queries, keys, scores, pairs);
      float inverses[ROWS];
      for (int64_t row = 0; row < rows; ++row)
        inverses[row] = exponentials(scores + row * columns, tokens, columns, probabilities + row * columns);
      at::native::cpublas::brgemm(
          ROWS, width, columns, columns, width, width, false, probabilities, values, sums, pairs);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < width; column += LANES)
          store(load(sums + row * width + column) * Vec(inverses[row]),
                result + (start + first + row) * hidden + head * width + column);
    }
    at::native::cpublas::brgemm_release(pairs);
  });
}

// packed_bert.attention.
Tensor attention(const Tensor& qkv, int64_t heads, at::IntArrayRef lengths) {
  const int64_t rows = qkv.size(0), hidden = qkv.size(1) / 3;
  std::vector<Block> blocks;
  int64_t start = 0, longest = 0;
  for (const int64_t tokens : lengths) {
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t first = 0; first < tokens; first += ROWS) blocks.push_back({start, tokens, head, first});
    start += tokens;
    longest = std::max(longest, (tokens + LANES - 1) / LANES * LANES);
  }
  Tensor result = at::empty({rows, hidden}, qkv.options());
  const auto compute = [&]<typename T>(T) {
    T* to = result.data_ptr<T>();
    attend<T>(qkv.const_data_ptr<T>(), hidden, heads, blocks, longest, to);
    for (int64_t row = start; row < rows; ++row) std::copy_n(to, hidden, to + row * hidden);
  };
  qkv.scalar_type() == at::kFloat ? compute(0.f) : compute(BFloat16(0.f));
  return result;
}

template <typename X, typename Y>
void add_norm_rows(const X* x, const Y* y, const float* weight, const float* bias, float epsilon, int64_t width,
                   int64_t begin, int64_t end, X* result) {
  Buffer<float> sums(width);
  for (int64_t row = begin; row < end; ++row) {
    Vec total(0.f), squares(0.f);
    for (int64_t column = 0; column < width; column += LANES) {
      const Vec value = load(x + row * width + column) + load(y + row * width + column);
      total = total + value;
      store(value, sums + column);
    }
    const Vec mean(sum(total) / width);
    for (int64_t column = 0; column < width; column += LANES) {
      const Vec difference = load(sums + column) - mean;
      squares = at::vec::fmadd(difference, difference, squares);
    }
    const Vec scale(1 / std::sqrt(sum(squares) / width + epsilon));
    for (int64_t column = 0; column < width; column += LANES) {
      const Vec normal = (load(sums + column) - mean) * scale;
      store(at::vec::fmadd(normal, load(weight + column), load(bias + column)), result + row * width + column);
    }
  }
}

// The norm of x + y, in the dtype of x: both (rows, width) in fp32 or bf16, `weight` and `bias` (width,) in fp32.
Tensor add_norm(const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias, double epsilon) {
  const int64_t width = x.size(1);
  Tensor result = at::empty_like(x);
  const auto compute = [&]<typename X, typename Y>(X, Y) {
    at::parallel_for(0, x.size(0), 8, [&](int64_t begin, int64_t end) {
      add_norm_rows(x.const_data_ptr<X>(), y.const_data_ptr<Y>(), weight.const_data_ptr<float>(),
                    bias.const_data_ptr<float>(), static_cast<float>(epsilon), width, begin, end, result.data_ptr<X>());
    });
  };
  const bool floats = x.scalar_type() == at::kFloat;
  if (y.scalar_type() == at::kFloat)
    floats ? compute(0.f, 0.f) : compute(BFloat16(0.f), 0.f);
  else
    floats ? compute(0.f, BFloat16(0.f)) : compute(BFloat16(0.f), BFloat16(0.f));
  return result;
}

// x (rows, width), in fp32 or bf16, as uint8: each value times its column's factor (width,) over `scale`, plus
// `zero_point`, rounded to the nearest whole number, halves to even ones.
Tensor quantize(const Tensor& x, const std::optional<Tensor>& factors, double scale, int64_t zero_point) {
  const int64_t width = x.size(1);
  Tensor result = at::empty(x.sizes(), at::kByte);
  const float* factor = factors ? factors->const_data_ptr<float>() : nullptr;
  uint8_t* to = result.data_ptr<uint8_t>();
  const Vec inverse(1 / static_cast<float>(scale)), zero(static_cast<float>(zero_point)), least(0.f), most(255.f);
  const auto compute = [&]<typename T>(T) {
    const T* from = x.const_data_ptr<T>();
    at::parallel_for(0, x.size(0), 8, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t column = 0; column < width; column += LANES) {
          Vec value = load(from + row * width + column);
          if (factor) value = value * load(factor + column);
          value = at::vec::minimum(at::vec::maximum(at::vec::fmadd(value, inverse, zero), least), most);
          const __m128i steps = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + row * width + column), steps);
        }
    });
  };
  x.scalar_type() == at::kFloat ? compute(0.f) : compute(BFloat16(0.f));
  return result;
}

}  // namespace

TORCH_LIBRARY(bert_squad, library) {
  library.def("attention(Tensor qkv, int heads, int[] lengths) -> Tensor", &attention);
  library.def("add_norm(Tensor x, Tensor y, Tensor weight, Tensor bias, float epsilon) -> Tensor", &add_norm);
  library.def("quantize(Tensor x, Tensor? factors, float scale, int zero_point) -> Tensor", &quantize);
}
