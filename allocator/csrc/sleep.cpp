// Sleep in three steps, of which only the last cannot be undone and cannot fail: masters, unmap, release. Unmapping
// keeps the handles and with them the bytes, so a refusal half way maps everything back, even what has no master.
#include <algorithm>
#include <map>

#include "csrc/clock.h"
#include "csrc/error.h"
#include "csrc/state.h"

namespace rotator {

static std::vector<Run> all_runs(const std::vector<Pool*>& pools) {
  std::vector<Run> runs;
  for (Pool* pool : pools)
    for (const Range& range : pool->mapped_runs()) runs.push_back({pool, range});
  return runs;
}

// From the top of a pool down, whole slots until `wanted` is reached; what they hold is taken off `wanted`.
static void select(Pool& pool, uint64_t& wanted, std::vector<Run>& runs) {
  for (auto it = pool.slots().rbegin(); it != pool.slots().rend() && wanted != 0; ++it) {
    const auto& [offset, slot] = *it;
    if (!slot.mapped) continue;
    wanted -= std::min<uint64_t>(wanted, slot.nbytes);
    const bool joins = !runs.empty() && runs.back().pool == &pool && runs.back().range.begin == offset + slot.nbytes;
    if (joins) runs.back().range.begin = offset;
    if (!joins) runs.push_back({&pool, {offset, offset + slot.nbytes}});
  }
}

// What is cheapest to restore goes first: discarded content comes back as zeros, small tags before the weights.
static std::vector<Run> enough_runs(std::vector<Pool*> pools, uint32_t offload, uint64_t bytes_wanted) {
  auto price = [&](const Pool* pool) { return std::pair((offload & bit(pool->tag)) != 0, -pool->tag); };
  std::stable_sort(pools.begin(), pools.end(), [&](Pool* a, Pool* b) { return price(a) < price(b); });
  std::map<const Device*, uint64_t> wanted;
  for (const Pool* pool : pools) wanted[&pool->device] = bytes_wanted;
  std::vector<Run> runs;
  for (Pool* pool : pools) select(*pool, wanted.at(&pool->device), runs);
  return runs;
}

void State::refuse_pinned(const std::vector<Pool*>& pools) const {
  for (const auto& [address, segment] : segments_) {
    if (segment.pins == 0 || std::find(pools.begin(), pools.end(), segment.pool) == pools.end()) continue;
    raise(RA_REGISTERED, "memory of these tags is registered for IPC or RDMA: deregister and unpin it, then sleep");
  }
}

// The chunks of offloaded segments that lose bytes with `run`, each once.
void State::add_chunks(const Run& run, std::vector<ChunkRun>& found) {
  const std::size_t size = masters_.options().chunk_bytes;
  auto it = segments_.upper_bound(run.pool->address(run.range.begin));
  if (it != segments_.begin() && std::prev(it)->second.pool == run.pool) --it;
  for (; it != segments_.end() && it->first < run.pool->address(run.range.end); ++it) {
    Segment& segment = it->second;
    const Range lost = intersection(run.range, {segment.offset, segment.offset + segment.nbytes});
    if (segment.pool != run.pool || lost.empty()) continue;
    const ChunkRun chunks{&segment, (lost.begin - segment.offset) / size,
                          (lost.end - segment.offset + size - 1) / size};
    found.push_back(chunks);
  }
}

// Runs of a pool come in any order, so one chunk may be named twice: at the border of two runs.
static void join(std::vector<ChunkRun>& runs) {
  std::sort(runs.begin(), runs.end(), [](const ChunkRun& a, const ChunkRun& b) {
    return std::pair(a.segment->address(), a.first) < std::pair(b.segment->address(), b.first);
  });
  std::vector<ChunkRun> joined;
  for (const ChunkRun& run : runs) {
    if (!joined.empty() && joined.back().segment == run.segment && joined.back().last >= run.first) {
      joined.back().last = std::max(joined.back().last, run.last);
    } else {
      joined.push_back(run);
    }
  }
  runs = std::move(joined);
}

static bool is_mapped(const Segment& segment, Range bytes) {
  std::size_t at = segment.offset + bytes.begin;
  for (const Range& run : segment.pool->mapped_runs())
    if (run.begin <= at && at < run.end) at = run.end;
  return at >= segment.offset + bytes.end;
}

// A chunk of a sleeping segment that has lost bytes before is as its master says, and cannot be read any more.
static std::vector<ChunkRun> readable(const Masters& masters, const ChunkRun& run) {
  std::vector<ChunkRun> parts;
  for (std::size_t i = run.first; i < run.last; ++i) {
    if (!is_mapped(*run.segment, masters.chunk(*run.segment, i))) continue;
    if (!parts.empty() && parts.back().last == i) {
      parts.back().last = i + 1;
    } else {
      parts.push_back({run.segment, i, i + 1});
    }
  }
  return parts;
}

// On failure every segment is as before, and the masters taken for it are gone again.
void State::take_masters(const std::vector<Run>& runs, uint32_t offload, ra_report& report) {
  std::vector<ChunkRun> chunks;
  uint32_t busy = 0;  // tags whose masters this is about
  for (const Run& run : runs) {
    if ((offload & bit(run.pool->tag)) == 0) continue;
    busy |= bit(run.pool->tag);
    add_chunks(run, chunks);
  }
  join(chunks);
  std::map<Device*, std::vector<ChunkRun>> by_device;
  for (const ChunkRun& run : chunks) {
    Pool& pool = *run.segment->pool;
    const auto parts = asleep(pool) ? readable(masters_, run) : std::vector<ChunkRun>{run};
    auto& all = by_device[&pool.device];
    all.insert(all.end(), parts.begin(), parts.end());
  }
  auto release_others = [&](uint64_t nbytes) { release_spare(nbytes, kAllTags & ~busy); };
  for (auto& [on, wanted] : by_device) masters_.take(*on, staging(*on), wanted, release_others, report);
}

// Maps the first `count` runs again. False when the driver refuses that too.
static bool map_back(const std::vector<Run>& runs, std::size_t count) {
  bool restored = true;
  for (std::size_t i = 0; i < count; ++i) {
    Journal journal;
    try {
      QuietContext scope(runs[i].pool->device);
      runs[i].pool->back(runs[i].range, false, journal);
    } catch (const Error&) {
      restored = false;
    }
    journal.commit();
  }
  return restored;
}

void State::unmap_all(const std::vector<Pool*>& pools, const std::vector<Run>& runs) {
  for (const Run& run : all_runs(pools)) run.pool->mark_intact(run.range);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    QuietContext scope(runs[i].pool->device);  // past the first unmap nothing may leave but through the rollback
    const CUresult result = runs[i].pool->unmap(runs[i].range);
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
    report.bytes_kept += pool->bytes_mapped();
    report.bytes_held += pool->bytes_held() - pool->bytes_mapped();
  }
}

void State::drop_discarded(uint32_t tags, ra_report& report) {
  for (auto& [address, segment] : segments_) {
    if ((tags & bit(segment.pool->tag)) == 0) continue;
    masters_.drop(segment);
    report.bytes_discarded += segment.nbytes;
  }
}

void State::sleep(uint32_t tags, uint32_t offload, bool strict, uint64_t bytes_wanted, ra_report& report) {
  if ((tags & ~kAllTags) != 0 || tags == 0) raise(RA_UNKNOWN_TAG, "unknown tag, or no tag at all");
  const std::vector<Pool*> pools = pools_of(tags);
  // Tags that sleep but kept bytes can go deeper.
  uint32_t ready = tags & ~asleep_;
  for (const Pool* pool : pools)
    if (pool->bytes_mapped() != 0) ready |= bit(pool->tag);
  if (ready == 0 || (strict && ready != tags)) raise(RA_ALREADY_ASLEEP, "the tags are already asleep: wake them first");
  refuse_pinned(pools);
  const Stopwatch watch;
  quiesce(pools);
  report.fence_seconds = watch.seconds();
  const std::vector<Run> runs = bytes_wanted == 0 ? all_runs(pools) : enough_runs(pools, offload, bytes_wanted);
  take_masters(runs, offload, report);
  const Stopwatch unmapping;
  unmap_all(pools, runs);
  report.map_seconds = unmapping.seconds();
  const Stopwatch releasing;
  release_all(pools, report);
  report.release_seconds = releasing.seconds();
  drop_discarded(ready & ~offload, report);
  asleep_ |= ready;
  masters_.arena().trim();
  tell_releasable();
  report.seconds = watch.seconds();
}

void State::prepare(uint32_t tags, ra_report& report) {
  const Stopwatch watch;
  const uint32_t awake = tags & ~asleep_;
  const std::vector<Pool*> pools = pools_of(awake);
  quiesce(pools);
  report.fence_seconds = watch.seconds();
  take_masters(all_runs(pools), awake, report);
  tell_releasable();
  report.seconds = watch.seconds();
}

}  // namespace rotator
