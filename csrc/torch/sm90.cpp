// Private ops beside the wgmma products: settings for a tuner, the watchdog's words, the trace's
// records.
#include "moekernels/sm90.h"

#include "device.h"
#include "moekernels/gemm_tuned.h"

namespace moekernels::binding {
namespace {

namespace sm90 = cuda::sm90;

#if defined(MOEKERNELS_SM90) || defined(MOEKERNELS_EMULATED)
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif
#ifdef MOEKERNELS_EMULATED
constexpr bool kEmulated = true;  // the tests bring the kernels
#else
constexpr bool kEmulated = false;
#endif

void check_built(const char* op) {
  check(kBuilt, op,
        ": this build holds no kernels for sm_90a; build with 90a-real in MOEKERNELS_CUDA_ARCHS");
}

std::string build_name() {
  std::string name = "none";
  if constexpr (kBuilt) {
    const sm90::Build build = sm90::build();
    name = build == sm90::Build::watchdog ? "watchdog"
           : build == sm90::Build::trace  ? "trace"
                                          : "plain";
  }
  return name;
}

// -1: none is called so.
template <size_t n>
int index_of(const char* const (&names)[n], const std::string& name) {
  for (size_t i = 0; i < n; ++i) {
    if (name == names[i]) return static_cast<int>(i);
  }
  return -1;
}

void settings(int64_t stages, int64_t band, int64_t grid, int64_t promotion,
              std::optional<bool> prefetch, std::optional<bool> bulk_sums, const std::string& style,
              const std::string& pair, std::optional<bool> gather, std::optional<bool> join,
              std::optional<bool> chain, std::optional<bool> route_at_once) {
  const char* op = "sm90_settings";
  check_built(op);
  check(stages == 0 || (stages >= 2 && stages <= 8), op,
        ": stages must be 0 (the table's) or 2 to 8, got ", stages);
  check(band >= -sm90::kMostBand && band <= sm90::kMostBand, op, ": band must be -",
        sm90::kMostBand, " to ", sm90::kMostBand, " (0: the default), got ", band);
  check(grid >= 0 && grid <= sm90::kMostGrid, op, ": grid must be 0 (the multiprocessors) to ",
        sm90::kMostGrid, ", got ", grid);
  check(promotion == 0 || promotion == 64 || promotion == 128 || promotion == 256, op,
        ": promotion must be 0 (the default), 64, 128 or 256 bytes, got ", promotion);
  const int style_index = index_of(kGemmStyles, style), pair_index = index_of(kGemmPairs, pair);
  check(style.empty() || style_index >= 0, op,
        ": style must be direct, hidden, pingpong or empty (the table's), got ", style);
  check(pair.empty() || pair_index >= 0, op,
        ": pair must be none, n, m or empty (the table's), got ", pair);
  if constexpr (kBuilt) {
    const auto told = [](std::optional<bool> flag) { return flag ? static_cast<int>(*flag) : -1; };
    sm90::set({static_cast<int>(stages), static_cast<int>(band), static_cast<int>(grid),
               static_cast<int>(promotion), told(prefetch), told(bulk_sums), style_index,
               pair_index, told(gather), told(join), told(chain), told(route_at_once)});
  }
}

void watchdog(double seconds) {
  const char* op = "sm90_watchdog";
  check(seconds >= 0 && seconds < 1e6, op, ": seconds must be 0 (no limit) to 1e6, got ", seconds);
  check(kEmulated || build_name() == "watchdog", op, ": this library's kernels have no watchdog (",
        build_name(), "); load _C_watch.so, which MOEKERNELS_WATCHDOG=1 builds");
  if constexpr (kBuilt) sm90::watch(static_cast<int64_t>(seconds * 1e9));
}

std::string stuck() {
  std::string text;
  if constexpr (kBuilt) text = sm90::stuck();
  return text;
}

std::string launched() {
  std::string names;
  if constexpr (kBuilt) names = sm90::launched();
  return names;
}

Tensor trace(const Tensor& like, int64_t launches, int64_t blocks, int64_t tiles) {
  const char* op = "sm90_trace";
  check(launches >= 0 && blocks >= 0 && tiles >= 0 && launches * blocks * tiles <= 1 << 20, op,
        ": launches, blocks and tiles must be 0 or more and at most 2^20 together, got ", launches,
        ", ", blocks, " and ", tiles);
  check(kEmulated || build_name() == "trace", op, ": this library's kernels record no trace (",
        build_name(), "); load _C_trace.so, which MOEKERNELS_TRACE=1 builds");
  static Tensor* kept = nullptr;  // the kernels write there as long as the library knows the place
  Tensor records = empty({launches, blocks, sm90::kTraceRoles, tiles, sm90::kTraceFields},
                         ScalarType::Long, like);
  torch::stable::zero_(records);
  if constexpr (kBuilt)
    sm90::trace(static_cast<int64_t*>(records.mutable_data_ptr()), launches, blocks, tiles);
  delete kept;
  kept = new Tensor(records);
  return records;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_sm90_build() -> str");
  m.def(
      "_sm90_settings(int stages=0, int band=0, int grid=0, int promotion=0, "
      "bool? prefetch=None, bool? bulk_sums=None, str style=\"\", str pair=\"\", "
      "bool? gather=None, bool? join=None, bool? chain=None, bool? route_at_once=None) -> ()");
  m.def("_sm90_watchdog(float seconds) -> ()");
  m.def("_sm90_stuck() -> str");
  m.def("_sm90_launched() -> str");
  m.def("_sm90_trace(Tensor like, int launches, int blocks, int tiles) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CompositeExplicitAutograd, m) {
  m.impl("_sm90_build", TORCH_BOX(&build_name));
  m.impl("_sm90_settings", TORCH_BOX(&settings));
  m.impl("_sm90_watchdog", TORCH_BOX(&watchdog));
  m.impl("_sm90_stuck", TORCH_BOX(&stuck));
  m.impl("_sm90_launched", TORCH_BOX(&launched));
  m.impl("_sm90_trace", TORCH_BOX(&trace));
}

}  // namespace moekernels::binding
