// The part of NVML that a reader of devices needs, over the same box. Shown bytes, real pids. Loaded under the name
// libnvidia-ml.so.1 it serves pynvml unmodified. `control/gpu<i>.nvml` holding `hang` makes queries of that device
// hang until the file goes; `fail <code>` makes them answer that code; `control/gpu<i>.foreign` holds bytes (shown)
// that belong to nobody. `control/gpu<i>.xids` holds the Xids that the device ever had, divided by blanks: an event set
// gets those that came after it was made. `control/gpu<i>.ecc` holds its count of uncorrectable errors.
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "sim/box.h"

#define NVML_EXPORT extern "C" __attribute__((visibility("default")))

using nvmlReturn = int;
using nvmlDevice = struct NvmlDevice*;

enum : nvmlReturn {
  NVML_SUCCESS = 0,
  NVML_UNINITIALIZED = 1,
  NVML_INVALID_ARGUMENT = 2,
  NVML_NOT_SUPPORTED = 3,
  NVML_NOT_FOUND = 6,
  NVML_INSUFFICIENT_SIZE = 7,
  NVML_DRIVER_NOT_LOADED = 9,
  NVML_TIMEOUT = 10,
};
enum : unsigned long long { NVML_EVENT_XID = 8 };

struct nvmlMemory {
  unsigned long long total, free, used;
};
struct nvmlMemory_v2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
struct nvmlProcessInfo {
  unsigned pid;
  unsigned long long used;
  unsigned gpu_instance, compute_instance;
};
struct nvmlPciInfo {
  char bus_id_legacy[16];
  unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
  char bus_id[32];
};
struct nvmlUtilization {
  unsigned gpu, memory;
};

struct nvmlEventData {
  nvmlDevice device;
  unsigned long long type, data;
  unsigned gpu_instance, compute_instance;
};
// What of each device's Xids an event set has given out; -1 for a device that it does not listen to.
struct nvmlEventSet {
  std::vector<int> given;
};

static sim::Box* box() { return sim::Box::open(); }
// A handle is the index plus one, so that it is never null.
static nvmlDevice handle_of(int index) { return reinterpret_cast<nvmlDevice>(static_cast<intptr_t>(index + 1)); }
static int index_of(nvmlDevice device) { return static_cast<int>(reinterpret_cast<intptr_t>(device)) - 1; }

static bool known(nvmlDevice device) {
  return box() != nullptr && index_of(device) >= 0 && index_of(device) < box()->config().devices;
}

static unsigned long long shown(uint64_t real_bytes) { return real_bytes * box()->config().scale; }

// Waits out a `hang`, then says what the query has to answer.
static nvmlReturn query(nvmlDevice device) {
  if (!known(device)) return NVML_INVALID_ARGUMENT;
  for (;;) {
    const std::string control = box()->control_for_device(index_of(device), "nvml");
    if (control.rfind("fail", 0) == 0) return std::atoi(control.c_str() + 4);
    if (control != "hang") return NVML_SUCCESS;
    const timespec pause{0, 20'000'000};
    nanosleep(&pause, nullptr);
  }
}

#define NVML_QUERY(device)                                           \
  do {                                                               \
    const nvmlReturn answer_ = query(device);                        \
    if (answer_ != NVML_SUCCESS) return answer_;                     \
  } while (0)

static nvmlReturn put(char* out, unsigned length, const std::string& text) {
  if (text.size() + 1 > length) return NVML_INSUFFICIENT_SIZE;
  std::snprintf(out, length, "%s", text.c_str());
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlInitWithFlags(unsigned) { return box() != nullptr ? NVML_SUCCESS : NVML_DRIVER_NOT_LOADED; }
NVML_EXPORT nvmlReturn nvmlInit_v2() { return nvmlInitWithFlags(0); }
NVML_EXPORT nvmlReturn nvmlShutdown() { return NVML_SUCCESS; }

NVML_EXPORT const char* nvmlErrorString(nvmlReturn result) {
  switch (result) {
    case NVML_SUCCESS: return "Success";
    case NVML_UNINITIALIZED: return "Uninitialized";
    case NVML_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_NOT_SUPPORTED: return "Not Supported";
    case NVML_NOT_FOUND: return "Not Found";
    case NVML_INSUFFICIENT_SIZE: return "Insufficient Size";
    case NVML_DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    default: return "Unknown Error";
  }
}

NVML_EXPORT nvmlReturn nvmlSystemGetDriverVersion(char* out, unsigned length) {
  return put(out, length, "580.0-simulated");
}
NVML_EXPORT nvmlReturn nvmlSystemGetNVMLVersion(char* out, unsigned length) {
  return put(out, length, "13.580.0-simulated");
}
NVML_EXPORT nvmlReturn nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 13000;
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetCount_v2(unsigned* count) {
  if (box() == nullptr) return NVML_UNINITIALIZED;
  *count = static_cast<unsigned>(box()->config().devices);
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice* device) {
  *device = handle_of(static_cast<int>(index));
  return known(*device) ? NVML_SUCCESS : NVML_INVALID_ARGUMENT;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetHandleByUUID(const char* uuid, nvmlDevice* device) {
  if (box() == nullptr) return NVML_UNINITIALIZED;
  for (int i = 0; i < box()->config().devices; ++i) {
    if (box()->config().uuids[i] != uuid) continue;
    *device = handle_of(i);
    return NVML_SUCCESS;
  }
  return NVML_NOT_FOUND;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetIndex(nvmlDevice device, unsigned* index) {
  if (!known(device)) return NVML_INVALID_ARGUMENT;
  *index = static_cast<unsigned>(index_of(device));
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetUUID(nvmlDevice device, char* out, unsigned length) {
  if (!known(device)) return NVML_INVALID_ARGUMENT;
  return put(out, length, box()->config().uuids[index_of(device)]);
}

NVML_EXPORT nvmlReturn nvmlDeviceGetName(nvmlDevice device, char* out, unsigned length) {
  if (!known(device)) return NVML_INVALID_ARGUMENT;
  return put(out, length, box()->config().name);
}

NVML_EXPORT nvmlReturn nvmlDeviceGetMemoryInfo(nvmlDevice device, nvmlMemory* memory) {
  NVML_QUERY(device);
  memory->total = shown(box()->device_bytes());
  memory->used = shown(box()->bytes_used(index_of(device)));
  memory->free = memory->total > memory->used ? memory->total - memory->used : 0;
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetMemoryInfo_v2(nvmlDevice device, nvmlMemory_v2* memory) {
  nvmlMemory plain{};
  const nvmlReturn result = nvmlDeviceGetMemoryInfo(device, &plain);
  if (result != NVML_SUCCESS) return result;
  memory->total = plain.total;
  memory->reserved = 0;
  memory->free = plain.free;
  memory->used = plain.used;
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice device, unsigned* count,
                                                               nvmlProcessInfo* infos) {
  NVML_QUERY(device);
  const auto processes = box()->processes(index_of(device));
  const unsigned capacity = *count;
  *count = static_cast<unsigned>(processes.size());
  if (processes.size() > capacity || (infos == nullptr && !processes.empty())) return NVML_INSUFFICIENT_SIZE;
  for (std::size_t i = 0; i < processes.size(); ++i)
    infos[i] = {static_cast<unsigned>(processes[i].pid), shown(processes[i].bytes), ~0u, ~0u};
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice device, unsigned* count,
                                                               nvmlProcessInfo* infos) {
  return nvmlDeviceGetComputeRunningProcesses_v3(device, count, infos);
}

NVML_EXPORT nvmlReturn nvmlDeviceGetCudaComputeCapability(nvmlDevice device, int* major, int* minor) {
  if (!known(device)) return NVML_INVALID_ARGUMENT;
  *major = box()->config().capability_major;
  *minor = box()->config().capability_minor;
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetPciInfo_v3(nvmlDevice device, nvmlPciInfo* info) {
  if (!known(device)) return NVML_INVALID_ARGUMENT;
  *info = {};
  info->bus = static_cast<unsigned>(index_of(device) + 1);
  info->pci_device_id = 0x2bb110de;
  std::snprintf(info->bus_id_legacy, sizeof info->bus_id_legacy, "0000:%02X:00.0", info->bus & 0xffu);
  std::snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", info->bus & 0xffu);
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetUtilizationRates(nvmlDevice device, nvmlUtilization* rates) {
  NVML_QUERY(device);
  *rates = {};
  return NVML_SUCCESS;
}

static std::vector<unsigned long long> xids_of(int index) {
  std::istringstream words(box()->control_for_device(index, "xids"));
  std::vector<unsigned long long> found;
  for (unsigned long long xid; words >> xid;) found.push_back(xid);
  return found;
}

NVML_EXPORT nvmlReturn nvmlEventSetCreate(nvmlEventSet** set) {
  if (box() == nullptr) return NVML_UNINITIALIZED;
  *set = new nvmlEventSet{std::vector<int>(box()->config().devices, -1)};
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlEventSetFree(nvmlEventSet* set) {
  delete set;
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceRegisterEvents(nvmlDevice device, unsigned long long types, nvmlEventSet* set) {
  NVML_QUERY(device);
  if ((types & NVML_EVENT_XID) == 0) return NVML_NOT_SUPPORTED;
  set->given[index_of(device)] = static_cast<int>(xids_of(index_of(device)).size());
  return NVML_SUCCESS;
}

// Looks once and does not wait: whoever uses the simulation polls.
NVML_EXPORT nvmlReturn nvmlEventSetWait_v2(nvmlEventSet* set, nvmlEventData* event, unsigned) {
  for (int i = 0; i < static_cast<int>(set->given.size()); ++i) {
    if (set->given[i] < 0) continue;
    const auto xids = xids_of(i);
    if (set->given[i] >= static_cast<int>(xids.size())) continue;
    *event = {handle_of(i), NVML_EVENT_XID, xids[set->given[i]++], ~0u, ~0u};
    return NVML_SUCCESS;
  }
  return NVML_TIMEOUT;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetTotalEccErrors(nvmlDevice device, int, int, unsigned long long* count) {
  NVML_QUERY(device);
  *count = std::strtoull(box()->control_for_device(index_of(device), "ecc").c_str(), nullptr, 10);
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetTemperature(nvmlDevice device, int, unsigned* celsius) {
  NVML_QUERY(device);
  *celsius = 40;
  return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetNumaNodeId(nvmlDevice device, unsigned* node) {
  if (!known(device)) return NVML_INVALID_ARGUMENT;
  *node = 0;
  return NVML_SUCCESS;
}
