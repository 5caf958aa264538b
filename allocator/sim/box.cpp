#include "sim/box.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>

namespace sim {

// Byte 0 of `locks` is the box's own lock, byte 1 + i belongs to row i.
static constexpr off_t kBoxByte = 0;
static constexpr off_t kFirstRowByte = 1;

// Classic record locks: a fork does not inherit them, as it does not inherit a CUDA context. They fall when the
// process closes any descriptor of the file, so nothing but this class may ever open it.
static bool lock_byte(int fd, off_t byte, short type, bool wait) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  int result;
  do result = fcntl(fd, wait ? F_SETLKW : F_SETLK, &lock);
  while (result != 0 && errno == EINTR);
  return result == 0;
}

static pid_t byte_holder(int fd, off_t byte) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  if (fcntl(fd, F_GETLK, &lock) != 0 || lock.l_type == F_UNLCK) return 0;
  return lock.l_pid;
}

class BoxLock {
 public:
  explicit BoxLock(int fd) : guard_(mutex()), fd_(fd) { lock_byte(fd_, kBoxByte, F_WRLCK, true); }
  ~BoxLock() { lock_byte(fd_, kBoxByte, F_UNLCK, false); }

 private:
  // Record locks do not hold threads of one process apart.
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  std::lock_guard<std::mutex> guard_;
  int fd_;
};

static BoxConfig read_config(const std::string& path) {
  BoxConfig config;
  std::ifstream file(path + "/box.conf");
  if (!file) throw std::runtime_error("no box.conf");
  for (std::string line; std::getline(file, line);) {
    const auto equals = line.find('=');
    if (equals == std::string::npos) continue;
    const std::string key = line.substr(0, equals), value = line.substr(equals + 1);
    if (key == "devices") config.devices = std::stoi(value);
    if (key == "name") config.name = value;
    if (key == "memory_bytes") config.memory_bytes = std::stoull(value);
    if (key == "scale") config.scale = std::stoull(value);
    if (key == "copy_gib_s") config.copy_gib_s = std::stod(value);
    if (key == "device_gib_s") config.device_gib_s = std::stod(value);
    if (key == "clear_gib_s") config.clear_gib_s = std::stod(value);
    if (key == "integrated") config.integrated = value == "1";
    if (key == "context_bytes") config.context_bytes = std::stoull(value);
    if (key == "capability_major") config.capability_major = std::stoi(value);
    if (key == "capability_minor") config.capability_minor = std::stoi(value);
    if (key.rfind("uuid.", 0) == 0) config.uuids.at(std::stoul(key.substr(5))) = value;
  }
  if (config.devices < 0 || config.devices > kDevicesMax || config.scale == 0) throw std::runtime_error("bad box.conf");
  return config;
}

static int open_sized(const std::string& path, off_t size) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0 || ftruncate(fd, size) != 0) throw std::runtime_error("cannot open " + path);
  return fd;
}

Box::Box(std::string path) : path_(std::move(path)), config_(read_config(path_)) {
  constexpr std::size_t size = sizeof(Row) * kRowsMax;
  const int fd = open_sized(path_ + "/rows", size);
  void* rows = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (rows == MAP_FAILED) throw std::runtime_error("cannot map the rows");
  rows_ = static_cast<Row*>(rows);
  locks_fd_ = open_sized(path_ + "/locks", kFirstRowByte + kRowsMax);
}

Box* Box::open() {
  static Box* const box = []() -> Box* {
    const char* path = std::getenv("ROTATOR_SIM_BOX");
    if (path == nullptr || *path == '\0') return nullptr;
    try {
      return new Box(path);
    } catch (const std::exception&) {
      return nullptr;
    }
  }();
  return box;
}

// Called under the box's lock. The old owner's bytes go before the new owner's pid appears: readers match both.
Row& Box::own_row() {
  if (own_ >= 0 && rows_[own_].pid == getpid()) return rows_[own_];
  for (int i = 0; i < kRowsMax; ++i) {
    if (!lock_byte(locks_fd_, kFirstRowByte + i, F_WRLCK, false)) continue;
    for (auto& bytes : rows_[i].bytes) bytes = 0;
    rows_[i].pid = getpid();
    own_ = i;
    return rows_[i];
  }
  throw std::bad_alloc();
}

bool Box::alive(int row) const {
  const pid_t pid = rows_[row].pid;
  if (pid == 0) return false;
  if (row == own_ && pid == getpid()) return true;  // one's own lock never shows
  return byte_holder(locks_fd_, kFirstRowByte + row) == pid;
}

std::vector<ProcessBytes> Box::processes(int device) const {
  std::vector<ProcessBytes> found;
  for (int i = 0; i < kRowsMax; ++i) {
    const uint64_t bytes = rows_[i].bytes[device];
    if (bytes != 0 && alive(i)) found.push_back({rows_[i].pid, bytes});
  }
  return found;
}

uint64_t Box::bytes_used(int device) const {
  uint64_t used = 0;
  for (const auto& process : processes(device)) used += process.bytes;
  const std::string foreign = control_for_device(device, "foreign");
  if (!foreign.empty()) used += std::strtoull(foreign.c_str(), nullptr, 10) / config_.scale;
  return used;
}

bool Box::take(int device, uint64_t nbytes) {
  const BoxLock lock(locks_fd_);
  Row& row = own_row();
  if (bytes_used(device) + nbytes > device_bytes()) return false;
  row.bytes[device] += nbytes;
  return true;
}

void Box::give(int device, uint64_t nbytes) {
  const BoxLock lock(locks_fd_);
  own_row().bytes[device] -= nbytes;
}

std::string Box::control(const std::string& name) const {
  std::ifstream file(path_ + "/control/" + name);
  std::string line;
  if (file) std::getline(file, line);
  return line;
}

std::string Box::control_for_device(int device, const char* what) const {
  return control("gpu" + std::to_string(device) + "." + what);
}

static int device_named(const BoxConfig& config, const std::string& name) {
  for (int i = 0; i < config.devices; ++i)
    if (name == config.uuids[i] || name == std::to_string(i)) return i;
  return -1;
}

// CUDA's own rule: the list ends at the first name that is not a device.
std::vector<int> visible_devices(const BoxConfig& config, const char* variable) {
  std::vector<int> devices;
  const char* listed = std::getenv(variable);
  if (listed == nullptr) {
    for (int i = 0; i < config.devices; ++i) devices.push_back(i);
    return devices;
  }
  std::istringstream names(listed);
  for (std::string name; std::getline(names, name, ',');) {
    const int device = device_named(config, name);
    if (device < 0) break;
    devices.push_back(device);
  }
  return devices;
}

}  // namespace sim
