// Masters: which chunks need a copy before their device bytes may go, where the copy lies, and taking it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "csrc/api.h"
#include "csrc/copies.h"
#include "csrc/segments.h"

namespace rotator {

struct MasterOptions {
  std::size_t chunk_bytes = 0;
  bool use_digest = true;
  HostOptions host;
  std::string spill_directory;  // empty: none
};

// Registered host memory through which masters pass on their way to and from the disk.
class Bounce {
 public:
  static constexpr std::size_t kBuffers = 4;
  Bounce(const Device& device, std::size_t chunk_bytes);
  ~Bounce();
  Bounce(const Bounce&) = delete;
  Bounce& operator=(const Bounce&) = delete;
  unsigned char* buffer(std::size_t number) const { return data_ + number % kBuffers * chunk_bytes_; }

 private:
  const Device& device_;
  std::size_t chunk_bytes_;
  unsigned char* data_ = nullptr;
};

class Masters {
 public:
  // `release_others(bytes)` gives back masters that nobody needs now, at least as many bytes where there are so many.
  using ReleaseOthers = std::function<void(uint64_t bytes)>;

  Masters(const Driver& driver, const MasterOptions& options);

  std::size_t chunks(const Segment& segment) const;
  Range chunk(const Segment& segment, std::size_t index) const;  // in bytes of the segment

  // Makes every chunk of `runs`, all on one device and mapped, equal to a valid master. On failure no master that was
  // valid before is lost unless its own chunk was being copied, and places taken for new ones are given back.
  // Throws Error: kHostMemory, the driver's.
  void take(Device& device, Pool& staging, const std::vector<ChunkRun>& runs, const ReleaseOthers& release_others,
            ra_report& report);
  // Digests of the chunks as they are on the device now; nothing where it has no kernel, or no room for the results.
  std::optional<std::vector<Digest>> digests(Device& device, Pool& staging, const std::vector<ChunkRun>& runs) const;

  void drop(MasterChunk& chunk);
  void drop(Segment& segment);

  // Whether new masters go to disk. Throws Error: kHostMemory without a spill directory.
  void prefer_disk(bool disk);
  bool to_disk(const Device& device) const { return prefers_disk_ || device.unified; }
  // Moves what lies in host memory. Returns bytes. On failure what was not moved is as it was.
  uint64_t move_to_disk(Segment& segment);

  HostArena& arena() { return arena_; }
  const HostArena& arena() const { return arena_; }
  SpillStore* spill() const { return spill_.get(); }
  const MasterOptions& options() const { return options_; }

 private:
  struct Task {
    Segment* segment;
    std::size_t index;
    std::optional<Digest> digest;
    bool fresh;  // its place was taken for this
  };
  MasterChunk& of(const Task& task) const { return task.segment->master[task.index]; }
  std::vector<Task> changed(Device& device, Pool& staging, const std::vector<ChunkRun>& runs, ra_report& report);
  void place(Device& device, std::vector<Task>& tasks, const ReleaseOthers& release_others);
  void make_room(Device& device, std::size_t nbytes, const ReleaseOthers& release_others);
  bool reserve_shared(Device& device, std::size_t nbytes);
  void copy_to_host(Device& device, const std::vector<Task>& tasks);
  void copy_to_disk(Device& device, const std::vector<Task>& tasks);

  const Driver& driver_;
  const MasterOptions options_;
  HostArena arena_;
  std::unique_ptr<SpillStore> spill_;
  bool prefers_disk_ = false;
};

}  // namespace rotator
