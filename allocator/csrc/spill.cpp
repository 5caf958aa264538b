#include "csrc/spill.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/error.h"
#include "csrc/forks.h"
#include "csrc/ranges.h"

namespace rotator {

static constexpr std::size_t kBlock = 4096;
static constexpr std::size_t kFileBytes = std::size_t{1} << 43;  // 8 TiB: what ext4 holds in a file, less a little
static constexpr std::size_t kRequestsMax = 1024;
static constexpr int kEndOfFile = -1;  // in place of an errno

FileCalls file_calls() { return {pread, pwrite, fallocate}; }

static bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % kBlock == 0; }

class SpillStore::Request {
 public:
  bool is_write = false;
  unsigned char* data = nullptr;
  SpillSlot slot;
  // Under the store's mutex.
  std::size_t next = 0;  // first byte that no worker has taken
  unsigned running = 0;
  int error = 0;
  bool settled = false;  // wait() has seen it
  Digest sum;

  bool is_dealt() const { return next >= slot.nbytes || error != 0; }
  bool is_done() const { return is_dealt() && running == 0; }
};

namespace {

struct Free {
  void operator()(unsigned char* data) const { std::free(data); }
};
using Bounce = std::unique_ptr<unsigned char, Free>;

}  // namespace

class SpillStore::Store {
 public:
  explicit Store(const SpillOptions& options);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  Ticket submit(bool is_write, unsigned char* data, const SpillSlot& slot);
  SpillSlot wait(Request& request);
  SpillSlot take_slot(std::size_t nbytes, const Digest& digest);
  void give(const SpillSlot& slot);
  uint64_t bytes_used() const;

  const SpillOptions options;
  std::atomic<bool> direct{true};
  bool is_memory = false;

 private:
  void open_file();
  void open_named();
  void try_out();
  void add_workers();
  void work();
  int move_chunk(const Request& request, std::size_t at, std::size_t nbytes, Bounce& bounce, Digest& sum);
  int move(bool is_write, unsigned char* data, std::size_t nbytes, uint64_t offset);
  int allocate(uint64_t offset, std::size_t nbytes);
  void forget_pages(bool is_write, uint64_t offset, std::size_t nbytes);
  void make_buffered();
  [[noreturn]] void refuse(const std::string& why, uint64_t wanted, uint64_t free) const;
  [[noreturn]] void fail(bool is_write, int error, uint64_t wanted) const;

  int fd_ = -1;
  mutable std::mutex mutex_;  // all below
  std::condition_variable work_, done_;
  std::deque<Ticket> queue_;  // requests with chunks left to deal
  bool closing_ = false;
  Ranges ranges_{kFileBytes};
  uint64_t bytes_used_ = 0;
  std::vector<std::thread> workers_;
};

void SpillStore::Store::refuse(const std::string& why, uint64_t wanted, uint64_t free) const {
  Error error;
  error.code = RA_HOST_MEMORY;
  error.bytes_wanted = wanted;
  error.bytes_free = free;
  error.message = "the masters do not fit the spill directory: " + why + ": " + options.directory;
  throw error;
}

void SpillStore::Store::fail(bool is_write, int error, uint64_t wanted) const {
  if (!is_write && error == kEndOfFile)
    raise(RA_MASTER_LOST, "a master on disk does not read back as it was written: the file ends: " + options.directory);
  if (!is_write) raise(RA_MASTER_LOST, "a master on disk cannot be read, " + std::string(std::strerror(error)) + ": " +
                                           options.directory);
  struct statvfs disk {};
  const uint64_t free = fstatvfs(fd_, &disk) == 0 ? uint64_t{disk.f_bavail} * disk.f_frsize : 0;
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  const std::string sizes = std::to_string(wanted) + " bytes wanted, " + std::to_string(free) + " free on the disk";
  refuse((full ? "it is full or its quota is, " : std::string(std::strerror(error)) + ", ") + sizes, wanted, free);
}

SpillStore::Store::Store(const SpillOptions& chosen) : options(chosen) {
  open_file();
  close_in_children(fd_);
  struct statfs system {};
  if (fstatfs(fd_, &system) == 0) is_memory = system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC;
  try {
    try_out();
  } catch (...) {
    forget_in_children(fd_);
    close(fd_);
    throw;
  }
}

void SpillStore::Store::open_file() {
  const char* folder = options.directory.c_str();
  constexpr int flags = O_TMPFILE | O_RDWR | O_CLOEXEC;
  fd_ = open(folder, flags | O_DIRECT, 0600);
  if (fd_ < 0 && errno == EINVAL) {
    direct = false;
    fd_ = open(folder, flags, 0600);
  }
  // Not every file system has files without a name.
  if (fd_ < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) open_named();
  if (fd_ < 0) refuse(std::string("it cannot be written, ") + std::strerror(errno), 0, 0);
}

void SpillStore::Store::open_named() {
  std::string path = options.directory + "/rotator-masters-XXXXXX";
  fd_ = mkostemp(path.data(), O_CLOEXEC);
  if (fd_ < 0) return;
  unlink(path.c_str());
  direct = fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) | O_DIRECT) == 0;
}

// A file system may accept the flag and refuse the transfer; a full one is better met now than at the first sleep.
void SpillStore::Store::try_out() {
  const Bounce block(static_cast<unsigned char*>(std::aligned_alloc(kBlock, kBlock)));
  if (!block) refuse("no memory for a buffer", kBlock, 0);
  std::memset(block.get(), 0, kBlock);
  if (const int error = move(true, block.get(), kBlock, 0)) fail(true, error, kBlock);
  if (const int error = move(false, block.get(), kBlock, 0)) fail(false, error, kBlock);
}

SpillStore::Store::~Store() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  work_.notify_all();
  for (auto& worker : workers_) worker.join();
  forget_in_children(fd_);
  close(fd_);
}

void SpillStore::Store::make_buffered() {
  direct = false;
  fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) & ~O_DIRECT);
}

// Pages of this file are of no use to anybody: memory is what is short.
void SpillStore::Store::forget_pages(bool is_write, uint64_t offset, std::size_t nbytes) {
  const auto from = static_cast<off_t>(offset), length = static_cast<off_t>(nbytes);
  constexpr unsigned kWrite = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  if (is_write) sync_file_range(fd_, from, length, kWrite);
  posix_fadvise(fd_, from, length, POSIX_FADV_DONTNEED);
}

// 0, an errno, or kEndOfFile. All of it, whatever pieces the system takes it in.
int SpillStore::Store::move(bool is_write, unsigned char* data, std::size_t nbytes, uint64_t offset) {
  for (std::size_t done = 0; done < nbytes;) {
    const auto at = static_cast<off_t>(offset + done);
    const bool was_direct = direct;
    const ssize_t moved = is_write ? options.calls.write(fd_, data + done, nbytes - done, at)
                                   : options.calls.read(fd_, data + done, nbytes - done, at);
    if (moved < 0 && errno == EINTR) continue;
    // Refused as a whole, or as the unaligned rest of a short transfer.
    if (moved < 0 && errno == EINVAL && was_direct) {
      make_buffered();
      continue;
    }
    if (moved < 0) return errno;
    if (moved == 0) return is_write ? ENOSPC : kEndOfFile;
    done += static_cast<std::size_t>(moved);
  }
  if (!direct) forget_pages(is_write, offset, nbytes);
  return 0;
}

int SpillStore::Store::move_chunk(const Request& request, std::size_t at, std::size_t nbytes, Bounce& bounce,
                                  Digest& sum) {
  unsigned char* data = request.data + at;
  const uint64_t offset = request.slot.offset + at;
  const std::size_t whole = round_up(nbytes, kBlock);
  unsigned char* through = data;
  if (!is_aligned(data) || whole != nbytes) {
    if (!bounce) bounce.reset(static_cast<unsigned char*>(std::aligned_alloc(kBlock, options.chunk_bytes)));
    if (!bounce) return ENOMEM;
    through = bounce.get();
  }
  if (request.is_write && through != data) {
    std::memcpy(through, data, nbytes);
    std::memset(through + nbytes, 0, whole - nbytes);
  }
  if (const int error = move(request.is_write, through, whole, offset)) return error;
  if (request.is_write) return 0;
  if (through != data) std::memcpy(data, through, nbytes);
  sum = digest_part(data, nbytes, at);
  return 0;
}

void SpillStore::Store::work() {
  Bounce bounce;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return closing_ || !queue_.empty(); });
    if (closing_) return;
    const Ticket request = queue_.front();
    const std::size_t at = request->next;
    const std::size_t nbytes = std::min<std::size_t>(options.chunk_bytes, request->slot.nbytes - at);
    request->next += nbytes;
    request->running += 1;
    if (request->is_dealt()) queue_.pop_front();
    lock.unlock();
    Digest sum;
    const int error = move_chunk(*request, at, nbytes, bounce, sum);
    lock.lock();
    for (int i = 0; i < 2; ++i) request->sum.words[i] += sum.words[i];
    request->running -= 1;
    if (error != 0 && request->error == 0) {
      request->error = error;
      queue_.erase(std::remove(queue_.begin(), queue_.end(), request), queue_.end());
    }
    if (request->is_done()) done_.notify_all();
  }
}

// Under the mutex. Threads start with the first request: a store that nobody uses costs nothing.
void SpillStore::Store::add_workers() {
  try {
    while (workers_.size() < std::max(1u, options.threads)) workers_.emplace_back([this] { work(); });
  } catch (const std::system_error& error) {
    if (workers_.empty()) raise(RA_INTERNAL, std::string("no thread for the spill directory: ") + error.what());
  }
}

SpillStore::Ticket SpillStore::Store::submit(bool is_write, unsigned char* data, const SpillSlot& slot) {
  auto request = std::make_shared<Request>();
  request->is_write = is_write;
  request->data = data;
  request->slot = slot;
  std::unique_lock<std::mutex> lock(mutex_);
  add_workers();
  done_.wait(lock, [&] { return queue_.size() < kRequestsMax; });
  if (slot.nbytes != 0) queue_.push_back(request);
  work_.notify_all();
  return request;
}

SpillSlot SpillStore::Store::wait(Request& request) {
  bool first = false;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return request.is_done(); });
    first = !std::exchange(request.settled, true);
  }
  if (request.error != 0) {
    if (request.is_write && first) give(request.slot);
    fail(request.is_write, request.error, request.slot.nbytes);
  }
  if (!request.is_write && request.sum != request.slot.digest)
    raise(RA_MASTER_LOST, "a master on disk does not read back as it was written: " + options.directory);
  return request.slot;
}

int SpillStore::Store::allocate(uint64_t offset, std::size_t nbytes) {
  int result;
  do result = options.calls.allocate(fd_, 0, static_cast<off_t>(offset), static_cast<off_t>(nbytes));
  while (result != 0 && errno == EINTR);
  // Without the call the disk's end is met while writing, with the same answer.
  return result == 0 || errno == EOPNOTSUPP || errno == ENOSYS ? 0 : errno;
}

SpillSlot SpillStore::Store::take_slot(std::size_t nbytes, const Digest& digest) {
  const std::size_t size = round_up(nbytes, kBlock);
  SpillSlot slot{0, nbytes, digest};
  if (size == 0) return slot;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t budget = options.budget_bytes;
    if (budget != 0 && (size > budget || bytes_used_ > budget - size))
      refuse("its budget is used up", size, budget - std::min(budget, bytes_used_));
    const auto offset = ranges_.take(size);
    if (!offset) refuse("its file would grow too large", size, ranges_.bytes_free());
    slot.offset = *offset;
    bytes_used_ += size;
  }
  if (const int error = allocate(slot.offset, size)) {
    give(slot);
    fail(true, error, size);
  }
  return slot;
}

void SpillStore::Store::give(const SpillSlot& slot) {
  const std::size_t size = round_up(slot.nbytes, kBlock);
  if (size == 0) return;
  // Where a hole cannot be made the bytes stay on the disk until the slot is used again.
  options.calls.allocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(slot.offset),
                         static_cast<off_t>(size));
  const std::lock_guard<std::mutex> lock(mutex_);
  ranges_.give(slot.offset, size);
  bytes_used_ -= size;
}

uint64_t SpillStore::Store::bytes_used() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_used_;
}

static SpillOptions checked(SpillOptions options) {
  options.chunk_bytes = round_up(std::max(options.chunk_bytes, kBlock), kBlock);
  return options;
}

SpillStore::SpillStore(const SpillOptions& options)
    : pid_(getpid()), store_(std::make_unique<Store>(checked(options))) {}

SpillStore::~SpillStore() {
  // Threads are not forked: joining them would wait for ever.
  if (getpid() != pid_) static_cast<void>(store_.release());
}

SpillStore::Store& SpillStore::store() const {
  if (getpid() != pid_) raise(RA_INTERNAL, "the spill directory belongs to the process that this one was forked from");
  return *store_;
}

SpillSlot SpillStore::write(const void* data, std::size_t nbytes, const Digest& digest) {
  return wait(start_write(data, nbytes, digest));
}

void SpillStore::read(const SpillSlot& slot, void* data, std::size_t nbytes) {
  if (nbytes != slot.nbytes) raise(RA_INVALID_SIZE, "a master on disk is read whole");
  wait(start_read(slot, data));
}

SpillStore::Ticket SpillStore::start_write(const void* data, std::size_t nbytes, const Digest& digest) {
  const SpillSlot slot = store().take_slot(nbytes, digest);
  // Only read from: one request type serves both directions.
  auto* from = static_cast<unsigned char*>(const_cast<void*>(data));
  try {
    return store().submit(true, from, slot);
  } catch (...) {
    give(slot);
    throw;
  }
}

SpillStore::Ticket SpillStore::start_read(const SpillSlot& slot, void* data) {
  return store().submit(false, static_cast<unsigned char*>(data), slot);
}

SpillSlot SpillStore::wait(const Ticket& ticket) { return store().wait(*ticket); }

void SpillStore::give(const SpillSlot& slot) { store().give(slot); }

uint64_t SpillStore::bytes_used() const { return store().bytes_used(); }
bool SpillStore::is_direct() const { return store().direct; }
bool SpillStore::is_memory() const { return store().is_memory; }
const std::string& SpillStore::directory() const { return store_->options.directory; }

}  // namespace rotator
