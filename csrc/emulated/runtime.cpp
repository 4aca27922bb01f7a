// The few entry points of the CUDA runtime that the launchers use. No CUDA header: a kernel is the
// name it registers.
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "emulated.h"

namespace {

moekernels_launch_fn launch_kernel = nullptr;
moekernels_array_fn new_array = nullptr;
int last_error = 0;
int capability = 80;

struct Dim3 {
  unsigned x, y, z;
};
struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} pending;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

// What the driver's encoder leaves in the 128 bytes of a CUtensorMap here, for
// python_tests/support/emulated.py to read.
struct EncodedTensorMap {
  uint64_t magic, address;
  uint32_t type, rank, swizzle, box[5];
  uint64_t sizes[5], strides[4];
  uint32_t promotion;
};
static_assert(sizeof(EncodedTensorMap) <= 128);

int encode_tensor_map(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                      const uint64_t* strides, const uint32_t* box, const uint32_t*, int,
                      int swizzle, int promotion, int) {
  constexpr int kInvalidValue = 1;
  if (rank < 1 || rank > 5 || address == nullptr) return kInvalidValue;
  EncodedTensorMap encoded{.magic = 0x70616d726f736e74,
                           .address = reinterpret_cast<uint64_t>(address),
                           .type = static_cast<uint32_t>(type),
                           .rank = rank,
                           .swizzle = static_cast<uint32_t>(swizzle),
                           .box = {},
                           .sizes = {},
                           .strides = {},
                           .promotion = static_cast<uint32_t>(promotion)};
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0) return kInvalidValue;
    encoded.sizes[i] = sizes[i];
    encoded.box[i] = box[i];
    if (i + 1 < rank) encoded.strides[i] = strides[i];
  }
  std::memset(map, 0, 128);
  std::memcpy(map, &encoded, sizeof encoded);
  return 0;
}

int launch(const char* kernel, Dim3 grid, Dim3 block, void** params, size_t shared,
           unsigned cluster, unsigned chained) {
  // 719: cudaErrorLaunchFailure
  last_error = launch_kernel != nullptr &&
                       launch_kernel(kernel, grid.x, block.x, shared, params, cluster, chained) == 0
                   ? 0
                   : 719;
  return last_error;
}

// cudaLaunchConfig_t and its attributes.
constexpr int kClusterDimension = 4, kProgrammaticStreamSerialization = 6;
struct LaunchAttribute {
  int id, pad;
  Dim3 size;  // of a union of 64 bytes; its first word is the other attribute's flag
  char rest[64 - sizeof(Dim3)];
};
static_assert(sizeof(LaunchAttribute) == 72);
struct LaunchConfig {
  Dim3 grid, block;
  size_t shared;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned count;
};

}  // namespace

namespace moekernels::emulated {
void note_array(const void* data, int64_t bytes) {
  if (new_array != nullptr) new_array(data, bytes, 0);
}
}  // namespace moekernels::emulated

extern "C" {

void moekernels_emulate(moekernels_launch_fn launch, moekernels_array_fn array) {
  launch_kernel = launch;
  new_array = array;
}

void moekernels_emulate_capability(int value) { capability = value; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  *static_cast<void**>(stream) = pending.stream;
  return 0;
}

int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<char*>(kernels().at(host).c_str());
  return 0;
}
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** params, size_t shared, void*) {
  return launch(static_cast<const char*>(kernel), grid, block, params, shared, 1, 0);
}
int cudaLaunchKernelExC(const LaunchConfig* config, const void* host, void** params) {
  unsigned cluster = 1, chained = 0;
  for (unsigned i = 0; i < config->count; ++i) {
    const LaunchAttribute& attribute = config->attributes[i];
    if (attribute.id == kClusterDimension) cluster = attribute.size.x;
    if (attribute.id == kProgrammaticStreamSerialization) chained = attribute.size.x;
  }
  return launch(kernels().at(host).c_str(), config->grid, config->block, params, config->shared,
                cluster, chained);
}

int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(int) { return "the emulated kernel failed"; }
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMajor = 75, kMinor = 76, kMultiprocessors = 16;
  *value = attribute == kMajor             ? capability / 10
           : attribute == kMinor           ? capability % 10
           : attribute == kMultiprocessors ? 4
                                           : 0;
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                     int* result) {
  *found = std::strcmp(name, "cuTensorMapEncodeTiled") == 0
               ? reinterpret_cast<void*>(&encode_tensor_map)
               : nullptr;
  if (result != nullptr) *result = 0;
  return 0;
}
int cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::calloc(1, bytes);
  if (new_array != nullptr) new_array(*memory, static_cast<int64_t>(bytes), 1);
  return 0;
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }

}  // extern "C"
