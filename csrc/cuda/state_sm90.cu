// The settings of the sm_90a products, and the host's side of the watchdog and the trace.
#include "sm90/state.cuh"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string>

#include "common/launch.cuh"

namespace moekernels::cuda::sm90 {
namespace {

constexpr int64_t kSecond = 1000000000;

struct State {
  std::mutex mutex;
  Settings settings;
  int64_t limit_ns = MOEKERNELS_WATCHDOG ? 2 * kSecond : 0;
  StuckWait* stuck = nullptr;
  int64_t* records = nullptr;
  int64_t launches = 0, blocks = 0, tiles = 0;
  std::deque<const char*> launched;
};

State& state() {
  static State* of_process = new State;  // outlives what runs at exit
  return *of_process;
}

const char* role_of(int warp) {
  return warp < 4 ? "consumer 0" : warp < 8 ? "consumer 1" : warp == 8 ? "producer" : "storer";
}

// By Awaited.
std::string awaited_of(int awaited) {
  constexpr const char* kNames[] = {"empty", "full", "stored", "packed", "turn"};
  return kNames[awaited % 5];
}

void print_stuck() {
  const char* text = stuck();
  if (*text != '\0') std::fputs(text, stderr);
}

constexpr const char* kLegend =
    "  a full barrier that stays shut: bytes that never came (a bad tensor map, or an "
    "expect_tx that is not the boxes' sum)\n"
    "  an empty one: arrivals that never came (a consumer that stopped earlier, or "
    "waits for another phase)\n"
    "  the CUDA errors beside it: 715 an illegal instruction or a bad tensor map, 716 a "
    "misaligned address, 719 a trap, as\n"
    "  after this message, or a barrier used wrongly\n";

}  // namespace

void set(const Settings& settings) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().settings = settings;
}

Settings settings() {
  std::lock_guard<std::mutex> lock(state().mutex);
  return state().settings;
}

Build build() {
  return MOEKERNELS_WATCHDOG ? Build::watchdog : MOEKERNELS_TRACE ? Build::trace : Build::plain;
}

void watch(int64_t limit_ns) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().limit_ns = limit_ns;
}

void trace(int64_t* records, int64_t launches, int64_t blocks, int64_t tiles) {
  std::lock_guard<std::mutex> lock(state().mutex);
  State& of = state();
  of.records = records;
  of.launches = launches;
  of.blocks = blocks;
  of.tiles = tiles;
}

Probe note_launch(const char* name) {
  std::lock_guard<std::mutex> lock(state().mutex);
  State& of = state();
  if (of.launched.size() == kLoggedLaunches) of.launched.pop_front();
  of.launched.push_back(name);
  Probe probe{};
  if (of.limit_ns > 0) {
    if (of.stuck == nullptr) {
      void* memory = nullptr;
      check(cudaHostAlloc(&memory, sizeof(StuckWait) * kStuckRecords, cudaHostAllocMapped),
            "the watchdog's records");
      of.stuck = static_cast<StuckWait*>(memory);
      for (int i = 0; i < kStuckRecords; ++i) of.stuck[i] = {};
      std::atexit(print_stuck);
    }
    probe.stuck = of.stuck;  // one address space: the device's pointer is the host's
    probe.limit_ns = of.limit_ns;
  }
  if (of.launches > 0) {
    probe.trace = of.records;
    probe.blocks = static_cast<int32_t>(of.blocks);
    probe.tiles = static_cast<int32_t>(of.tiles);
    of.records += of.blocks * kTraceRoles * of.tiles * kTraceFields;
    --of.launches;
  }
  return probe;
}

const char* launched() {
  std::lock_guard<std::mutex> lock(state().mutex);
  static std::string* text = new std::string;
  text->clear();
  for (const char* name : state().launched) *text += (text->empty() ? "" : ",") + std::string(name);
  state().launched.clear();
  return text->c_str();
}

const char* stuck() {
  std::lock_guard<std::mutex> lock(state().mutex);
  static std::string* text = new std::string;
  text->clear();
  int count = 0;
  for (int i = 0; state().stuck != nullptr && i < kStuckRecords; ++i) {
    const StuckWait& at = state().stuck[i];
    if (at.found == 0 || ++count > 40) continue;
    *text += "watchdog: block " + std::to_string(at.block) + ", " + role_of(at.warp) + " (warp " +
             std::to_string(at.warp) + ") waits for " + awaited_of(at.awaited) + "[" +
             std::to_string(at.stage) + "], phase " + std::to_string(at.phase) + ", step " +
             std::to_string(at.step) + " of a tile of group " + std::to_string(at.group) + "\n";
  }
  if (count > 40) *text += "watchdog: and " + std::to_string(count - 40) + " more\n";
  if (count > 0) *text += kLegend;
  return text->c_str();
}

}  // namespace moekernels::cuda::sm90
