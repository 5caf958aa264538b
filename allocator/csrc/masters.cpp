#include "csrc/masters.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>

#include "csrc/clock.h"
#include "csrc/error.h"

namespace rotator {

// How long a sleep waits for other processes to give masters back that they can spare.
static constexpr std::chrono::milliseconds kAskWait{2000}, kAskStep{10};
// Chunks that are packed together: they take so much device memory while a sleep copies them.
static constexpr std::size_t kPackedAtOnce = 8;

Bounce::Bounce(const Device& device, std::size_t chunk_bytes)
    : device_(device), chunk_bytes_(round_up(chunk_bytes, 4096)) {
  const std::size_t nbytes = kBuffers * chunk_bytes_;
  void* data = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (data == MAP_FAILED) raise(RA_HOST_MEMORY, "no host memory for the buffers of the spill directory");
  const CUresult result = device.driver.MemHostRegister(data, nbytes, CU_MEMHOSTREGISTER_PORTABLE);
  if (result != CUDA_SUCCESS) {
    munmap(data, nbytes);
    raise_driver(device.driver, result, "MemHostRegister");
  }
  data_ = static_cast<unsigned char*>(data);
}

Bounce::~Bounce() {
  QuietContext scope(device_);
  CUresult result = device_.driver.MemHostUnregister(data_);
  if (result != CUDA_SUCCESS) result = device_.driver.MemHostUnregister(data_);
  // What the driver may still reach is leaked rather than unmapped under it.
  if (result == CUDA_SUCCESS) munmap(data_, kBuffers * chunk_bytes_);
}

static std::unique_ptr<SpillStore> open_spill(const MasterOptions& options) {
  if (options.spill_directory.empty()) return nullptr;
  SpillOptions spill;
  spill.directory = options.spill_directory;
  return std::make_unique<SpillStore>(spill);
}

Masters::Masters(const Driver& driver, const MasterOptions& options)
    : driver_(driver), options_(options), arena_(options.host), spill_(open_spill(options)) {}

std::size_t Masters::chunks(const Segment& segment) const {
  return (segment.nbytes + options_.chunk_bytes - 1) / options_.chunk_bytes;
}

Range Masters::chunk(const Segment& segment, std::size_t index) const {
  const std::size_t begin = index * options_.chunk_bytes;
  return {begin, std::min(begin + options_.chunk_bytes, segment.nbytes)};
}

void Masters::drop(MasterChunk& chunk) {
  if (chunk.host) arena_.give(*chunk.host);
  if (chunk.disk) spill_->give(*chunk.disk);
  chunk.host.reset();
  chunk.disk.reset();
  chunk.digest.reset();
  chunk.valid = false;
  chunk.packed = 0;
  ++chunk.version;
}

void Masters::drop(Segment& segment) {
  for (MasterChunk& chunk : segment.master) drop(chunk);
  segment.master.clear();
}

void Masters::prefer_disk(bool disk) {
  if (disk && spill_ == nullptr) raise(RA_HOST_MEMORY, "masters can go to disk only with a spill directory: give one");
  prefers_disk_ = disk;
}

uint64_t Masters::move_to_disk(Segment& segment) {
  uint64_t moved = 0;
  for (std::size_t i = 0; i < segment.master.size(); ++i) {
    MasterChunk& master = segment.master[i];
    if (!master.host) continue;
    const std::size_t nbytes = master.stored(chunk(segment, i).nbytes());
    if (master.valid) {
      const bool is_known = master.digest && master.packed == 0;
      const Digest digest = is_known ? *master.digest : digest_of(master.host->data(), nbytes);
      master.disk = spill_->write(master.host->data(), nbytes, digest);
      if (!master.digest) master.digest = digest;
      moved += nbytes;
    }
    arena_.give(*std::exchange(master.host, std::nullopt));
    ++master.version;
  }
  return moved;
}

std::optional<std::vector<Digest>> Masters::digests(Device& device, Pool& staging,
                                                    const std::vector<ChunkRun>& runs) const {
  if (!options_.use_digest || !device.digest.ready()) return std::nullopt;
  std::size_t count = 0;
  for (const ChunkRun& run : runs) count += run.last - run.first;
  std::vector<Digest> found(count);
  if (count == 0) return found;
  const std::size_t nbytes = count * sizeof(Digest);
  std::optional<Scratch> results;
  try {
    results.emplace(staging, nbytes);
  } catch (const Error& error) {
    if (error.code == RA_OUT_OF_MEMORY) return std::nullopt;
    throw;
  }
  const CUstream stream = device.fill.get();
  try {
    CUdeviceptr out = results->address();
    RA_TRY(driver_, MemsetD8Async, out, 0, nbytes, stream);
    for (const ChunkRun& run : runs) {
      const Range bytes{chunk(*run.segment, run.first).begin, chunk(*run.segment, run.last - 1).end};
      device.digest.launch(run.segment->address() + bytes.begin, bytes.nbytes(), options_.chunk_bytes, out, stream);
      out += (run.last - run.first) * sizeof(Digest);
    }
    RA_TRY(driver_, MemcpyDtoHAsync, found.data(), results->address(), nbytes, stream);
    RA_TRY(driver_, StreamSynchronize, stream);
  } catch (...) {
    driver_.StreamSynchronize(stream);
    throw;
  }
  return found;
}

// The chunks whose master is missing or differs.
std::vector<Masters::Task> Masters::changed(Device& device, Pool& staging, const std::vector<ChunkRun>& runs,
                                            ra_report& report) {
  const Stopwatch watch;
  const auto now = digests(device, staging, runs);
  report.digest_seconds += watch.seconds();
  std::vector<Task> tasks;
  std::size_t at = 0;
  for (const ChunkRun& run : runs) {
    run.segment->master.resize(chunks(*run.segment));
    for (std::size_t i = run.first; i < run.last; ++i, ++at) {
      const std::optional<Digest> digest = now ? std::optional<Digest>((*now)[at]) : std::nullopt;
      const MasterChunk& master = run.segment->master[i];
      const Range bytes = chunk(*run.segment, i);
      if (master.valid && digest && master.digest == digest) {
        report.bytes_unchanged += bytes.nbytes();
      } else {
        tasks.push_back({run.segment, i, digest, run.segment->address() + bytes.begin, bytes.nbytes()});
      }
    }
  }
  return tasks;
}

// Asks the other processes that share the budget, and waits a little. False when they did not help.
bool Masters::reserve_shared(Device& device, std::size_t nbytes) {
  SharedBudget* shared = arena_.shared_budget();
  if (shared == nullptr) return false;
  shared->ask(nbytes);
  const auto deadline = std::chrono::steady_clock::now() + kAskWait;
  bool reserved = false;
  while (!reserved && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(kAskStep);
    try {
      arena_.reserve(device, nbytes);
      reserved = true;
    } catch (const Error& error) {
      if (error.code != RA_HOST_MEMORY) throw;
    }
  }
  shared->ask(0);
  return reserved;
}

// Room for `nbytes` in host memory, or as much of it as there can be.
void Masters::make_room(Device& device, std::size_t nbytes, const ReleaseOthers& release_others) {
  for (int attempt = 0;; ++attempt) {
    try {
      return arena_.reserve(device, nbytes);
    } catch (const Error& error) {
      if (error.code != RA_HOST_MEMORY) throw;
      if (attempt == 0) {
        // The masters of awake engines come first: they can be taken again.
        release_others(error.bytes_wanted - std::min(error.bytes_wanted, error.bytes_free));
        arena_.trim();
        continue;
      }
      if (reserve_shared(device, nbytes)) return;
      if (spill_ == nullptr) throw;
      const std::size_t part = round_down(error.bytes_free, options_.chunk_bytes);
      if (part == 0 || part >= nbytes || attempt > 1) return;
      nbytes = part;
    }
  }
}

void Masters::place(Device& device, Batch tasks, const ReleaseOthers& release_others) {
  std::size_t missing = 0;
  for (const Task& task : tasks) {
    MasterChunk& master = of(task);
    // What it holds is out of date, and its place is of another size.
    if (master.host && master.host->nbytes != HostArena::block_bytes(task.nbytes)) drop(master);
    if (!master.placed()) missing += HostArena::block_bytes(task.nbytes);
  }
  if (missing == 0) return;
  if (device.unified && spill_ == nullptr)
    raise(RA_HOST_MEMORY,
          "device and host memory are one here, so masters in host memory free nothing: give a spill directory");
  if (!to_disk(device)) make_room(device, missing, release_others);
  for (Task& task : tasks) {
    MasterChunk& master = of(task);
    if (master.placed()) continue;
    task.fresh = true;
    if (to_disk(device)) continue;
    master.host = arena_.take(device, task.nbytes);
    // There is room in all, but perhaps in pieces.
    if (!master.host && spill_ == nullptr) master.host = arena_.take_or_grow(device, task.nbytes);
  }
}

void Masters::copy_to_host(Device& device, Batch tasks) {
  Copies copies(device, arena_, Copies::Direction::kToHost);
  for (const Task& task : tasks) {
    MasterChunk& master = of(task);
    if (!master.host) continue;
    master.valid = false;
    ++master.version;
    copies.add(task.source, master.host->data(), task.nbytes);
  }
  copies.flush();
}

void Masters::copy_to_disk(Device& device, Batch tasks, std::optional<Bounce>& bounce) {
  struct Pending {
    const Task* task = nullptr;
    SpillStore::Ticket ticket;
  };
  std::array<Pending, Bounce::kBuffers> pending;
  auto settle = [&](Pending& one) {
    if (one.task == nullptr) return;
    const Task& task = *std::exchange(one.task, nullptr);
    MasterChunk& master = of(task);
    master.disk = spill_->wait(one.ticket);
    master.digest = task.packed != 0 ? task.digest : master.disk->digest;
    master.packed = task.packed;
    master.valid = true;
  };
  try {
    std::size_t number = 0;
    for (const Task& task : tasks) {
      MasterChunk& master = of(task);
      if (master.host) continue;
      if (!bounce) bounce.emplace(device, options_.chunk_bytes);
      Pending& buffer = pending[number % Bounce::kBuffers];
      settle(buffer);
      unsigned char* data = bounce->buffer(number++);
      if (master.disk) spill_->give(*std::exchange(master.disk, std::nullopt));
      master.valid = false;
      ++master.version;
      RA_TRY(driver_, MemcpyDtoHAsync, data, task.source, task.nbytes, device.disk.get());
      RA_TRY(driver_, StreamSynchronize, device.disk.get());
      const bool is_known = task.digest && task.packed == 0;
      const Digest digest = is_known ? *task.digest : digest_of(data, task.nbytes);
      buffer = {&task, spill_->start_write(data, task.nbytes, digest)};
    }
    for (Pending& one : pending) settle(one);
  } catch (...) {
    // Nothing may still write from the buffers, nor copy into them.
    driver_.StreamSynchronize(device.disk.get());
    for (Pending& one : pending) {
      try {
        settle(one);
      } catch (const Error&) {
        // The first error is the one to tell.
      }
    }
    throw;
  }
}

std::vector<Masters::Batch> Masters::batches_of(std::vector<Task>& tasks, std::size_t size) {
  std::vector<Batch> batches;
  for (std::size_t at = 0; at < tasks.size(); at += size)
    batches.push_back({tasks.data() + at, tasks.data() + std::min(at + size, tasks.size())});
  return batches;
}

std::unique_ptr<Packer> Masters::open_packer(Device& device, Pool& staging, std::size_t count) const {
  const bool wanted = options_.use_packing && options_.use_digest && count != 0;
  return wanted ? Packer::open(device, staging, options_.chunk_bytes, count) : nullptr;
}

// Turns each task into one of its packed bytes, where that is worth it. True when that changed no task's size.
bool Masters::pack(Device& device, Packer& packer, Batch batch, ra_report& report) const {
  const Stopwatch watch;
  std::vector<Packer::Source> sources;
  for (const Task& task : batch) {
    const Range bytes = chunk(*task.segment, task.index);
    sources.push_back({task.segment->address() + bytes.begin, bytes.nbytes(), *task.digest});
  }
  const std::vector<std::size_t> sizes = packer.pack(sources, device.fill.get());
  bool same = true;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    Task& task = batch.first[i];
    const std::size_t nbytes = sizes[i] != 0 ? sizes[i] : sources[i].nbytes;
    same = same && task.nbytes == nbytes;
    task.packed = sizes[i];
    task.nbytes = nbytes;
    task.source = sizes[i] != 0 ? packer.packed(i) : sources[i].address;
  }
  report.digest_seconds += watch.seconds();
  return same;
}

void Masters::copy_out(Device& device, Batch batch, std::optional<Bounce>& bounce, ra_report& report) {
  const Stopwatch watch;
  copy_to_host(device, batch);
  copy_to_disk(device, batch, bounce);
  device.finish();
  report.copy_seconds += watch.seconds();
  for (const Task& task : batch) {
    MasterChunk& master = of(task);
    const std::size_t nbytes = chunk(*task.segment, task.index).nbytes();
    report.bytes_copied += nbytes;
    if (!master.host) report.bytes_spilled += nbytes;
    if (master.host) master.digest = task.digest;
    master.packed = task.packed;
    master.valid = true;
  }
}

void Masters::take(Device& device, Pool& staging, const std::vector<ChunkRun>& runs,
                   const ReleaseOthers& release_others, ra_report& report) {
  ContextScope scope(device);
  std::vector<Task> tasks = changed(device, staging, runs, report);
  if (tasks.empty()) return;
  const std::size_t at_once = tasks.front().digest ? std::min(tasks.size(), kPackedAtOnce) : 0;
  // Both outlive the copies that use them.
  const auto packer = open_packer(device, staging, at_once);
  std::optional<Bounce> bounce;
  const std::vector<Batch> batches = batches_of(tasks, packer ? at_once : tasks.size());
  try {
    // All sizes first, so that room is asked for once; packing again costs a hundredth of a copy.
    if (packer)
      for (const Batch& batch : batches) pack(device, *packer, batch, report);
    const Stopwatch placing;
    place(device, batches_of(tasks, tasks.size()).front(), release_others);
    report.host_seconds += placing.seconds();
    for (const Batch& batch : batches) {
      const bool again = packer && batches.size() > 1;
      if (again && !pack(device, *packer, batch, report)) place(device, batch, release_others);
      copy_out(device, batch, bounce, report);
    }
  } catch (...) {
    device.settle();  // copies that still run write into the places about to go
    for (const Task& task : tasks)
      if (task.fresh) drop(of(task));
    arena_.trim();
    throw;
  }
}

}  // namespace rotator
