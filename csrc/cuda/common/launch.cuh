// The one way to launch: every kernel takes its op's arguments as one struct, and a failure names
// the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "moekernels/common.h"

// Where g++ compiles the kernels, for the sanitizers, csrc/simt/simt.h launches them.
#ifdef __CUDACC__
// A block's dynamic shared memory, as an array.
#define MOEKERNELS_DYNAMIC_SHARED(T, name) extern __shared__ __align__(16) T name[]
#endif

namespace moekernels::cuda {

constexpr int kWarp = 32;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef __CUDACC__
// Throws with the kernel's name where the call before failed; says what this build holds where the
// device has no kernel.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string arch = std::to_string(major) + std::to_string(minor);
    message = std::string(what) +
              ": this build holds kernels for " MOEKERNELS_CUDA_ARCHS ", not for sm_" + arch +
              "; rebuild with MOEKERNELS_CUDA_ARCHS=" + arch + "-real";
  }
  throw std::runtime_error(message);
}
#endif

inline void check_blocks(const char* name, int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(blocks) +
                             " blocks are more than a grid holds; give fewer tokens at once");
  }
}

template <class... Args>
void launch(const char* name, void (*kernel)(Args...), int64_t blocks, int threads, int64_t shared,
            Stream stream, const Args&... args) {
  if (blocks <= 0) return;
  check_blocks(name, blocks);
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(
      args...);
  check(cudaGetLastError(), name);
#else
  simt::launch(name, static_cast<unsigned>(blocks), threads, shared, [&] { kernel(args...); });
#endif
}

#ifdef __CUDACC__
// In clusters of so many blocks; `chained`: the launch may begin before the one ahead of it in its
// stream has ended, and waits for that on the device (sm90/chained.cuh).
struct LaunchHow {
  int cluster = 1;
  bool chained = false;
};

template <class... Args>
void launch_as(const LaunchHow& how, const char* name, void (*kernel)(Args...), int64_t blocks,
               int threads, int64_t shared, Stream stream, const Args&... args) {
  if (blocks <= 0) return;
  check_blocks(name, blocks);
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  if (how.chained) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

template <class... Args>
void launch_clusters(const char* name, void (*kernel)(Args...), int64_t clusters, int size,
                     int threads, int64_t shared, Stream stream, const Args&... args) {
  launch_as({.cluster = size}, name, kernel, clusters * size, threads, shared, stream, args...);
}
#endif

}  // namespace moekernels::cuda
