// Masters: which chunks need a copy before their device bytes may go, where the copy lies, and taking it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "csrc/api.h"
#include "csrc/copies.h"
#include "csrc/packer.h"
#include "csrc/segments.h"

namespace rotator {

struct MasterOptions {
  std::size_t chunk_bytes = 0;
  bool use_digest = true;
  bool use_packing = true;  // where the device can, and it is worth it
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

  // Null where packing is off, or this device cannot do it now.
  std::unique_ptr<Packer> open_packer(Device& device, Pool& staging, std::size_t count) const;

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
    CUdeviceptr source;      // what to copy, on the device
    std::size_t nbytes;      // of it
    std::size_t packed = 0;  // the same, when it is packed
    bool fresh = false;      // its place was taken for this
  };
  // Consecutive tasks.
  struct Batch {
    Task* first;
    Task* last;
    Task* begin() const { return first; }
    Task* end() const { return last; }
  };
  MasterChunk& of(const Task& task) const { return task.segment->master[task.index]; }
  std::vector<Task> changed(Device& device, Pool& staging, const std::vector<ChunkRun>& runs, ra_report& report);
  static std::vector<Batch> batches_of(std::vector<Task>& tasks, std::size_t size);
  bool pack(Device& device, Packer& packer, Batch batch, ra_report& report) const;
  void copy_out(Device& device, Batch batch, std::optional<Bounce>& bounce, ra_report& report);
  void place(Device& device, Batch tasks, const ReleaseOthers& release_others);
  void make_room(Device& device, std::size_t nbytes, const ReleaseOthers& release_others);
  bool reserve_shared(Device& device, std::size_t nbytes);
  void copy_to_host(Device& device, Batch tasks);
  void copy_to_disk(Device& device, Batch tasks, std::optional<Bounce>& bounce);

  const Driver& driver_;
  const MasterOptions options_;
  HostArena arena_;
  std::unique_ptr<SpillStore> spill_;
  bool prefers_disk_ = false;
};

}  // namespace rotator
