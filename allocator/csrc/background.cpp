#include "csrc/background.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "csrc/clock.h"
#include "csrc/error.h"

namespace rotator {

using namespace std::chrono_literals;

// How often what other processes ask for is looked at.
static constexpr auto kPromises = 50ms;
// Between looks at a capture that must end, or a reserve in the foreground.
static constexpr auto kMoment = 2ms;

// One chunk under way. What is noted here lets `finish` see that the segment is still the same one.
struct Background::Job {
  Device* device = nullptr;
  CUdeviceptr segment = 0;
  uint64_t segment_id = 0;
  std::size_t index = 0;
  Range bytes;
  unsigned version = 0;
  std::optional<Digest> known;  // of the master that there is
  Digest digest;
  std::optional<HostBlock> host;
  std::optional<SpillSlot> disk;
  std::size_t packed = 0;  // as in MasterChunk
};

// Device and host memory that the chunks pass through, for one device at a time.
struct Background::Staging {
  Device* device = nullptr;
  std::optional<Scratch> memory;  // a chunk, then its digest
  std::unique_ptr<Packer> packer;  // null: chunks are taken as they are
  std::optional<Bounce> bounce;    // only for masters that go to disk
  void reset() {
    bounce.reset();
    packer.reset();
    memory.reset();
  }
};

Background::Background(std::mutex& mutex, State& state, double link_share)
    : mutex_(mutex), state_(state), link_share_(link_share) {
  if (state_.masters().arena().shared_budget() != nullptr) thread_.emplace([this] { run(); });
}

Background::~Background() {
  {
    const std::lock_guard<std::mutex> lock(own_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_) thread_->join();
}

void Background::start(uint32_t tags) {
  const std::lock_guard<std::mutex> lock(own_);
  tags_ = tags;
  restart_ = true;
  status_ = {};
  status_.running = 1;
  if (!thread_) thread_.emplace([this] { run(); });
  changed_.notify_all();
}

ra_prepare_state Background::status() const {
  const std::lock_guard<std::mutex> lock(own_);
  return status_;
}

Background::Pause::Pause(Background& background) : background_(background) {
  std::unique_lock<std::mutex> lock(background_.own_);
  ++background_.pauses_;
  background_.changed_.notify_all();
  background_.changed_.wait(lock, [this] { return !background_.on_device_; });
}

Background::Pause::~Pause() {
  const std::lock_guard<std::mutex> lock(background_.own_);
  --background_.pauses_;
  background_.changed_.notify_all();
}

bool Background::interrupted() const {
  const std::lock_guard<std::mutex> lock(own_);
  return stopping_ || pauses_ != 0 || restart_;
}

uint32_t Background::tags() const {
  const std::lock_guard<std::mutex> lock(own_);
  return tags_;
}

void Background::end(int code, const char* message) {
  const std::lock_guard<std::mutex> lock(own_);
  if (restart_) return;
  status_.running = 0;
  status_.code = code;
  std::snprintf(status_.message, sizeof status_.message, "%s", message);
}

void Background::run() {
  int mode = kCaptureModeRelaxed;
  // Calls of this thread must not spoil a capture that another thread runs.
  if (state_.driver().ThreadExchangeStreamCaptureMode != nullptr)
    state_.driver().ThreadExchangeStreamCaptureMode(&mode);
  std::unique_lock<std::mutex> lock(own_);
  while (!stopping_) {
    const bool shared = state_.masters().arena().shared_budget() != nullptr;
    const auto awake = [this] { return stopping_ || (status_.running != 0 && pauses_ == 0); };
    if (shared) {
      changed_.wait_for(lock, kPromises, awake);
    } else {
      changed_.wait(lock, awake);
    }
    if (stopping_) break;
    const bool ready = awake();
    lock.unlock();
    if (shared) keep_promises();
    if (ready) work();
    lock.lock();
  }
}

// Gives back what other processes wait for: masters of awake tags, which can be taken again.
void Background::keep_promises() {
  try {
    const uint64_t asked = state_.masters().arena().shared_budget()->asked();
    if (asked == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    state_.release_spare(asked, kAllTags);
    state_.masters().arena().trim();
    state_.tell_releasable();
  } catch (const Error&) {
    // Whoever asked waits on, and asks the budget again.
  }
}

bool Background::enter() {
  const std::lock_guard<std::mutex> lock(own_);
  if (stopping_ || pauses_ != 0) return false;
  on_device_ = true;
  if (std::exchange(restart_, false)) {
    cursor_ = cursor_chunk_ = 0;
    host_is_full_ = false;
  }
  return true;
}

void Background::leave(double seconds) {
  const std::lock_guard<std::mutex> lock(own_);
  on_device_ = false;
  status_.seconds += seconds;
  changed_.notify_all();
}

// Chunk after chunk until all are done or somebody wants the device. Host memory is made between two visits to the
// device, because it takes long and a sleep should not wait for it.
void Background::work() {
  try {
    while (enter()) {
      const Stopwatch watch;
      Device* device = nullptr;
      Outcome outcome = Outcome::kDone;
      try {
        outcome = copy_chunks(device);
      } catch (...) {
        leave(watch.seconds());
        throw;
      }
      leave(watch.seconds());
      if (outcome != Outcome::kNeedsRoom) {
        if (!interrupted()) end(RA_OK, "");
        return;
      }
      grow(*device);
    }
  } catch (const Error& error) {
    end(error.code, error.message.c_str());
  } catch (const std::exception& error) {
    end(RA_INTERNAL, error.what());
  }
}

Background::Outcome Background::copy_chunks(Device*& needs_room) {
  Staging staging;
  auto release = [&] {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (staging.device != nullptr) staging.device->driver.StreamSynchronize(staging.device->background.get());
    staging.reset();
  };
  Outcome outcome = Outcome::kGoOn;
  try {
    while (outcome == Outcome::kGoOn && !interrupted()) outcome = step(staging);
  } catch (...) {
    release();
    throw;
  }
  release();
  needs_room = staging.device;
  return outcome;
}

Background::Outcome Background::step(Staging& staging) {
  const Stopwatch watch;
  std::optional<Job> job = choose(staging);
  if (!job) return Outcome::kDone;
  if (job->device == nullptr) {
    std::this_thread::sleep_for(kMoment);  // a capture is running
    return Outcome::kGoOn;
  }
  try {
    if (differs(*job, staging) && !copy(*job, staging)) return Outcome::kNeedsRoom;
  } catch (...) {
    job->device->driver.StreamSynchronize(job->device->background.get());
    give_back(*job);
    throw;
  }
  finish(*job);
  pace(watch.seconds());
  return Outcome::kGoOn;
}

// One step of host memory for what is to come.
void Background::grow(Device& device) {
  Masters& masters = state_.masters();
  const Stopwatch watch;
  try {
    // Beyond what is free: that was not enough, or is in pieces.
    const std::size_t chunk = HostArena::block_bytes(masters.options().chunk_bytes);
    if (!masters.arena().grow(device, masters.arena().bytes_free(device) + chunk))
      std::this_thread::sleep_for(kMoment);  // a reserve in the foreground goes first
  } catch (const Error& error) {
    if (error.code != RA_HOST_MEMORY || masters.spill() == nullptr) throw;
    host_is_full_ = true;
  }
  pace(watch.seconds());
}

// The next chunk at or behind the cursor, its copy into staging queued. A job without a device: not now.
std::optional<Background::Job> Background::choose(Staging& staging) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Masters& masters = state_.masters();
  if (state_.capturing()) return Job{};
  const uint32_t wanted = tags();
  uint64_t total = 0, done = 0;
  std::optional<Job> job;
  for (auto& [address, segment] : state_.segments()) {
    if ((wanted & bit(segment.pool->tag)) == 0 || state_.asleep(*segment.pool) || segment.freed) continue;
    total += segment.nbytes;
    const std::size_t first = address < cursor_ ? SIZE_MAX : address == cursor_ ? cursor_chunk_ : 0;
    const std::size_t count = masters.chunks(segment);
    done += std::min(segment.nbytes, std::min(first, count) * masters.options().chunk_bytes);
    if (job || first >= count) continue;
    segment.master.resize(count);
    job.emplace();
    job->device = &segment.pool->device;
    job->segment = address;
    job->segment_id = segment.id;
    job->index = first;
    job->bytes = masters.chunk(segment, first);
    job->version = segment.master[first].version;
    if (segment.master[first].valid) job->known = segment.master[first].digest;
  }
  {
    const std::lock_guard<std::mutex> own(own_);
    status_.bytes_total = total;
    status_.bytes_done = done;
  }
  if (job) begin(*job, staging);
  return job;
}

void Background::begin(Job& job, Staging& staging) {
  Device& on = *job.device;
  ContextScope scope(on);
  const std::size_t chunk = round_up(state_.masters().options().chunk_bytes, 16);
  if (staging.device != &on) {
    staging.reset();
    staging.memory.emplace(state_.staging(on), chunk + sizeof(Digest));
    staging.packer = state_.masters().open_packer(on, state_.staging(on), 1);
    staging.device = &on;
  }
  const CUdeviceptr memory = staging.memory->address();
  const CUstream stream = on.background.get();
  RA_TRY(on.driver, MemcpyDtoDAsync, memory, job.segment + job.bytes.begin, job.bytes.nbytes(), stream);
  if (!on.digest.ready()) return;
  RA_TRY(on.driver, MemsetD8Async, memory + chunk, 0, sizeof(Digest), stream);
  on.digest.launch(memory, job.bytes.nbytes(), chunk, memory + chunk, stream);
}

// Whether the chunk needs a new master.
bool Background::differs(Job& job, Staging& staging) {
  Device& on = *job.device;
  ContextScope scope(on);
  const std::size_t chunk = round_up(state_.masters().options().chunk_bytes, 16);
  const CUstream stream = on.background.get();
  if (on.digest.ready())
    RA_TRY(on.driver, MemcpyDtoHAsync, job.digest.words, staging.memory->address() + chunk, sizeof(Digest), stream);
  RA_TRY(on.driver, StreamSynchronize, stream);
  return !on.digest.ready() || !job.known || *job.known != job.digest;
}

// False: there is no room in host memory yet.
bool Background::copy(Job& job, Staging& staging) {
  Masters& masters = state_.masters();
  Device& on = *job.device;
  ContextScope scope(on);
  const CUstream stream = on.background.get();
  CUdeviceptr source = staging.memory->address();
  std::size_t nbytes = job.bytes.nbytes();
  if (staging.packer) job.packed = staging.packer->pack({{source, nbytes, job.digest}}, stream).front();
  if (job.packed != 0) {
    source = staging.packer->packed(0);
    nbytes = job.packed;
  }
  if (!masters.to_disk(on)) job.host = masters.arena().take(on, nbytes);
  if (!job.host && !masters.to_disk(on) && !host_is_full_) return false;
  if (!job.host && masters.spill() == nullptr)
    raise(RA_HOST_MEMORY, "device and host memory are one here: give a spill directory for masters");
  if (!job.host && !staging.bounce) staging.bounce.emplace(on, masters.options().chunk_bytes);
  unsigned char* data = job.host ? job.host->data() : staging.bounce->buffer(0);
  // A copy may not cross from one registration into the next.
  for (std::size_t at = 0; at < nbytes;) {
    const std::size_t run = job.host ? masters.arena().run_bytes(data + at, nbytes - at) : nbytes;
    RA_TRY(on.driver, MemcpyDtoHAsync, data + at, source + at, run, stream);
    at += run;
  }
  RA_TRY(on.driver, StreamSynchronize, stream);
  if (!on.digest.ready()) job.digest = digest_of(data, nbytes);
  if (!job.host) job.disk = masters.spill()->write(data, nbytes, job.packed != 0 ? digest_of(data, nbytes) : job.digest);
  return true;
}

void Background::finish(Job& job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Masters& masters = state_.masters();
  const auto it = state_.segments().find(job.segment);
  const bool alive = it != state_.segments().end() && it->second.id == job.segment_id &&
                     job.index < it->second.master.size() && it->second.master[job.index].version == job.version;
  cursor_ = job.segment;
  cursor_chunk_ = job.index + 1;
  if (alive && (job.host || job.disk)) {
    MasterChunk& chunk = it->second.master[job.index];
    masters.drop(chunk);
    chunk.host = std::exchange(job.host, std::nullopt);
    chunk.disk = std::exchange(job.disk, std::nullopt);
    chunk.digest = job.digest;
    chunk.packed = job.packed;
    chunk.valid = true;
    state_.tell_releasable();
  }
  give_back(job);
}

// What a job still holds was not put in place.
void Background::give_back(Job& job) {
  Masters& masters = state_.masters();
  if (job.host) masters.arena().give(*std::exchange(job.host, std::nullopt));
  if (job.disk) masters.spill()->give(*std::exchange(job.disk, std::nullopt));
}

// Stands still as long as its share of the time asks, but not when somebody waits. Pinning memory needs that more than
// copies do: the engine's own calls wait for the driver meanwhile.
void Background::pace(double busy_seconds) {
  const double rest_seconds = busy_seconds * (1.0 - link_share_) / link_share_;
  std::unique_lock<std::mutex> lock(own_);
  changed_.wait_for(lock, std::chrono::duration<double>(rest_seconds),
                    [this] { return stopping_ || pauses_ != 0 || restart_; });
}

}  // namespace rotator
