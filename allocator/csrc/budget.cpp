#include "csrc/budget.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <thread>

#include "csrc/error.h"
#include "csrc/forks.h"

namespace rotator {

static constexpr int kRowsMax = 1024;
static constexpr off_t kRowBytes = 64;
static constexpr off_t kFirstRow = 4096;  // the byte 0 before it is the lock of the whole table
static constexpr auto kLockWait = std::chrono::seconds(10);

static off_t row_at(int row) { return kFirstRow + row * kRowBytes; }

// Locks of the open file: they hold against other descriptors of this process too, and no other close() drops them.
static bool set_lock(int fd, off_t byte, short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return fcntl(fd, F_OFD_SETLK, &lock) == 0;
}

static bool is_locked(int fd, off_t byte) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

// Bounded, because a process may be stopped while it holds the lock.
class SharedBudget::FileLock {
 public:
  explicit FileLock(const SharedBudget& budget) : fd_(budget.fd_) {
    const auto deadline = std::chrono::steady_clock::now() + kLockWait;
    while (!set_lock(fd_, 0, F_WRLCK)) {
      if (errno != EAGAIN && errno != EACCES && errno != EINTR) budget.fail(std::strerror(errno));
      if (std::chrono::steady_clock::now() > deadline) budget.fail("another process holds its lock and does not move");
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }
  ~FileLock() { set_lock(fd_, 0, F_UNLCK); }
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  const int fd_;
};

void SharedBudget::fail(const std::string& why) const {
  raise(RA_BUDGET_FILE, "the shared host budget cannot be used: " + why + ": " + path_);
}

SharedBudget::SharedBudget(const std::string& path) : path_(path), pid_(getpid()) {
  own_.pid = pid_;
  read_budget(true);
  join();
}

SharedBudget::~SharedBudget() {
  // A child has neither the row nor the descriptor.
  if (getpid() != pid_ || fd_ < 0) return;
  own_ = {};
  try {
    write_row();
  } catch (const Error&) {
    // The lock goes with the descriptor, and with it the row.
  }
  leave();
}

void SharedBudget::leave() noexcept {
  forget_in_children(fd_);
  close(fd_);
  fd_ = row_ = -1;
}

// A budget that cannot be read for a moment, because it is being rewritten, stays what it was.
void SharedBudget::read_budget(bool strict) {
  char text[128] = {};
  const int fd = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0 && !strict) return;
  if (fd < 0) fail(std::string(std::strerror(errno)) + ", write 'rotator-host-budget 1 <bytes>' to it");
  const ssize_t length = pread(fd, text, sizeof text - 1, 0);
  close(fd);
  uint64_t nbytes = 0;
  char end = 0;
  const bool read = length > 0 && std::sscanf(text, "rotator-host-budget 1 %" SCNu64 "%c", &nbytes, &end) == 2;
  if (read && end == '\n') budget_ = nbytes;
  else if (strict) fail("its first line is not 'rotator-host-budget 1 <bytes>'");
}

void SharedBudget::join() {
  struct stat configured {};
  const mode_t mode = stat(path_.c_str(), &configured) == 0 ? configured.st_mode & 0666 : 0600;
  const std::string rows = path_ + ".rows";
  fd_ = open(rows.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, mode);
  if (fd_ < 0) fail(std::string("its .rows cannot be written, ") + std::strerror(errno));
  close_in_children(fd_);
  try {
    const FileLock lock(*this);
    if (!take_row()) fail("too many processes share it");
    write_row();
  } catch (...) {
    leave();
    throw;
  }
}

bool SharedBudget::take_row() {
  for (row_ = 0; row_ < kRowsMax; ++row_)
    if (set_lock(fd_, row_at(row_), F_WRLCK)) return true;
  return false;
}

void SharedBudget::write_row() {
  ssize_t written;
  do written = pwrite(fd_, &own_, sizeof own_, row_at(row_));
  while (written < 0 && errno == EINTR);
  if (written != sizeof own_) fail(std::string("its .rows cannot be written, ") + std::strerror(errno));
}

// Our own row is written again with every call, so whatever happened to the file heals.
SharedBudget::Table SharedBudget::read_table() {
  std::vector<char> bytes(kRowsMax * kRowBytes);
  const ssize_t length = pread(fd_, bytes.data(), bytes.size(), kFirstRow);
  if (length < 0) fail(std::strerror(errno));
  Table table;
  for (int i = 0; i < kRowsMax; ++i) {
    Row row;
    std::memcpy(&row, bytes.data() + i * kRowBytes, sizeof row);
    if (i == row_) table.own = table.rows.size();
    if (i == row_) table.rows.push_back(own_);
    else if (row.pid != 0 && is_locked(fd_, row_at(i))) table.rows.push_back(row);
  }
  return table;
}

uint64_t SharedBudget::Table::bytes_used() const {
  uint64_t used = 0;
  for (const Row& row : rows) used += row.bytes_used;
  return used;
}

// What `need` takes from rows other than `asker`, largest first. Every process computes the same from the same rows.
static uint64_t put_on(std::vector<uint64_t>& left, uint64_t need, std::size_t asker, std::size_t own) {
  uint64_t mine = 0;
  while (need != 0) {
    std::size_t most = asker == 0 ? 1 : 0;
    for (std::size_t i = 0; i < left.size(); ++i)
      if (i != asker && left[i] > left[most]) most = i;
    if (most >= left.size() || left[most] == 0) break;
    const uint64_t part = std::min(need, left[most]);
    left[most] -= part;
    need -= part;
    if (most == own) mine += part;
  }
  return mine;
}

uint64_t SharedBudget::Table::asked_of_own(uint64_t budget) const {
  const uint64_t used = bytes_used();
  uint64_t free = budget - std::min(budget, used);
  std::vector<uint64_t> left;
  for (const Row& row : rows) left.push_back(row.bytes_releasable);
  uint64_t mine = put_on(left, used - std::min(used, budget), rows.size(), own);
  for (std::size_t asker = 0; asker < rows.size(); ++asker) {
    const uint64_t served = std::min(free, rows[asker].bytes_asked);
    free -= served;
    mine += put_on(left, rows[asker].bytes_asked - served, asker, own);
  }
  return mine;
}

template <typename Body>
auto SharedBudget::locked(Body body) {
  if (getpid() != pid_) fail("this process was forked from the one that opened it");
  const std::lock_guard<std::mutex> guard(mutex_);
  struct stat opened {};
  // Somebody removed the rows: meet the others in the new file.
  if (fstat(fd_, &opened) != 0 || opened.st_nlink == 0) {
    leave();
    join();
  }
  read_budget(false);
  const FileLock lock(*this);
  return body();
}

bool SharedBudget::claim(uint64_t nbytes) {
  return locked([&] {
    const uint64_t used = read_table().bytes_used();
    if (nbytes > budget_ || used > budget_ - nbytes) return false;
    own_.bytes_used += nbytes;
    own_.bytes_asked -= std::min(own_.bytes_asked, nbytes);
    write_row();
    return true;
  });
}

// Whoever gives is past failing. Without the table's lock, because nobody else writes this row; and should it not be
// written now, the next call writes it.
void SharedBudget::give(uint64_t nbytes) noexcept {
  if (getpid() != pid_) return;
  const std::lock_guard<std::mutex> guard(mutex_);
  own_.bytes_used -= std::min(own_.bytes_used, nbytes);
  own_.bytes_releasable = std::min(own_.bytes_releasable, own_.bytes_used);
  try {
    write_row();
  } catch (const Error&) {
    return;
  }
}

void SharedBudget::set_releasable(uint64_t nbytes) {
  locked([&] {
    own_.bytes_releasable = std::min(nbytes, own_.bytes_used);
    write_row();
  });
}

void SharedBudget::ask(uint64_t nbytes) {
  locked([&] {
    own_.bytes_asked = nbytes;
    write_row();
  });
}

uint64_t SharedBudget::asked() {
  return locked([&] { return read_table().asked_of_own(budget_); });
}

uint64_t SharedBudget::bytes_budget() {
  return locked([&] { return budget_; });
}

uint64_t SharedBudget::bytes_used() {
  return locked([&] { return read_table().bytes_used(); });
}

uint64_t SharedBudget::bytes_free() {
  return locked([&] { return budget_ - std::min(budget_, read_table().bytes_used()); });
}

std::vector<SharedBudget::Row> SharedBudget::rows() {
  return locked([&] { return read_table().rows; });
}

}  // namespace rotator
