// Tensor maps for TMA. The driver's encoder is found through the runtime, so that nothing links to
// libcuda.
#pragma once

#include <cuda.h>

#include <initializer_list>

#include "common/launch.cuh"

namespace moekernels::cuda::sm90 {

inline auto tensor_map_encoder() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (found == nullptr)
      throw std::runtime_error(
          "the CUDA driver has no cuTensorMapEncodeTiled; update it to 12.0 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encode;
}

constexpr int kNoPromotion = 0;  // of what is written alone

// A map of a contiguous array of `type`, whose elements have `width` bytes, that is cut into boxes
// of 128 bytes by `box_lines` lines, with the 128-byte swizzle; what lies outside loads as zeros,
// and `promotion` bytes come to L2 at once. `shape` begins with the innermost dimension.
inline CUtensorMap encoded_map(CUtensorMapDataType type, int64_t width, const void* data,
                               std::initializer_list<int64_t> shape, int box_lines, int promotion) {
  cuuint64_t sizes[3], strides[3], bytes = static_cast<cuuint64_t>(width);
  cuuint32_t box[3] = {static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(box_lines), 1};
  cuuint32_t steps[3] = {1, 1, 1}, rank = 0;
  for (int64_t size : shape) {
    sizes[rank] = static_cast<cuuint64_t>(size);
    strides[rank++] = bytes *= static_cast<cuuint64_t>(size);
  }
  const CUtensorMapL2promotion promoted = promotion == kNoPromotion
                                              ? CU_TENSOR_MAP_L2_PROMOTION_NONE
                                          : promotion == 64  ? CU_TENSOR_MAP_L2_PROMOTION_L2_64B
                                          : promotion == 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B
                                                             : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  CUtensorMap map;
  const CUresult error =
      tensor_map_encoder()(&map, type, rank, const_cast<void*>(data), sizes, strides, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promoted,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    std::string text = "cuTensorMapEncodeTiled: error " + std::to_string(error) + " for [";
    for (cuuint32_t i = rank; i-- > 0;) text += std::to_string(sizes[i]) + (i ? ", " : "]");
    throw std::runtime_error(text);
  }
  return map;
}

inline CUtensorMap tensor_map(DType dtype, const void* data, std::initializer_list<int64_t> shape,
                              int box_lines, int promotion) {
  const auto type = dtype == DType::f32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encoded_map(type, size_of(dtype), data, shape, box_lines, promotion);
}

// Of bytes, for e4m3.
inline CUtensorMap byte_map(const void* data, std::initializer_list<int64_t> shape, int box_lines,
                            int promotion) {
  return encoded_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data, shape, box_lines, promotion);
}

}  // namespace moekernels::cuda::sm90
