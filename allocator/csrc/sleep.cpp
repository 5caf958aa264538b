// Sleep in three steps, of which only the last cannot be undone and cannot fail: masters, unmap, release. Unmapping
// keeps the handles and with them the bytes, so a refusal half way maps everything back, even what has no master.
#include "csrc/clock.h"
#include "csrc/error.h"
#include "csrc/state.h"

namespace rotator {

struct Run {
  Pool* pool;
  std::size_t first;
  std::size_t last;
};

static std::vector<Run> mapped_runs(const std::vector<Pool*>& pools) {
  std::vector<Run> runs;
  for (Pool* pool : pools)
    for (std::size_t i = 0; i < pool->slots.size(); ++i) {
      if (!pool->slots[i].mapped) continue;
      const bool joins = !runs.empty() && runs.back().pool == pool && runs.back().last == i;
      if (joins) runs.back().last = i + 1;
      if (!joins) runs.push_back({pool, i, i + 1});
    }
  return runs;
}

static void mark_intact(const std::vector<Run>& runs) {
  for (const Run& run : runs)
    for (std::size_t i = run.first; i < run.last; ++i) run.pool->slots[i].intact = true;
}

// Maps the first `count` runs again. False when the driver refuses that too.
static bool map_back(const std::vector<Run>& runs, std::size_t count) {
  bool restored = true;
  for (std::size_t i = 0; i < count; ++i) {
    Journal journal;
    try {
      QuietContext scope(runs[i].pool->device);
      runs[i].pool->back(runs[i].first, runs[i].last, journal);
    } catch (const Error&) {
      restored = false;
    }
    journal.commit();
  }
  return restored;
}

void State::unmap_all(const std::vector<Pool*>& pools) {
  const std::vector<Run> runs = mapped_runs(pools);
  mark_intact(runs);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    QuietContext scope(runs[i].pool->device);  // past the first unmap nothing may leave but through the rollback
    const CUresult result = runs[i].pool->unmap(runs[i].first, runs[i].last);
    if (result == CUDA_SUCCESS) continue;
    if (map_back(runs, i)) raise_driver(driver_, result, "MemUnmap");
    // The bytes are still behind their handles: calling it asleep lets a wake map them without any copy.
    for (Pool* pool : pools) asleep_ |= bit(pool->tag);
    raise(RA_ROLLBACK_FAILED, "unmap failed and so did mapping back: the tags are asleep, nothing is lost, wake them");
  }
}

void State::release_all(const std::vector<Pool*>& pools, ra_report& report) {
  for (Pool* pool : pools) {
    QuietContext scope(pool->device);
    report.bytes_device += pool->release_unmapped();
    report.bytes_device += pool->release_unmapped();  // once more for what was refused: it is cheap, and often enough
    report.bytes_held += pool->bytes_mapped();
  }
}

void State::sleep(uint32_t tags, uint32_t offload, bool strict, ra_report& report) {
  if ((tags & ~kAllTags) != 0 || tags == 0) raise(RA_UNKNOWN_TAG, "unknown tag, or no tag at all");
  const uint32_t awake = tags & ~asleep_;
  if (awake == 0 || (strict && awake != tags)) raise(RA_ALREADY_ASLEEP, "already asleep");
  const Stopwatch watch;
  quiesce(awake);
  report.fence_seconds = watch.seconds();
  take_masters(awake & offload, report);
  const std::vector<Pool*> pools = pools_of(awake);
  const Stopwatch unmapping;
  unmap_all(pools);
  release_all(pools, report);
  report.map_seconds = unmapping.seconds();
  for (auto& [address, segment] : segments_) {
    if ((awake & ~offload & bit(segment.pool->tag)) == 0) continue;
    drop_master(segment);
    report.bytes_discarded += segment.nbytes;
  }
  arena_.trim();
  asleep_ |= awake;
  report.seconds = watch.seconds();
}

}  // namespace rotator
