// Faults and delays for any driver call, by rule or by seed, and the log of calls that tests read.
//
// Rules are separated by `;`:  cuMemCreate@3=2      the third call from now answers 2
//                              cuMemMap@2x5=2       the second to the sixth
//                              *@17=999             the seventeenth call of any name
//                              cuMemcpy*=1          every call whose name begins so
//                              cuMemUnmap~50        each call takes 50 ms longer
//                              cuCtxRecordEvent!    answers success and does nothing
//                              seed:7/20            each call fails with 20 in 1,000, drawn from seed 7
// They come from ROTATOR_SIM_FAULTS, from rotatorSimFaults(), and from `control/faults` and `control/faults.<pid>` in
// the box, read again whenever those change.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "csrc/driver.h"

namespace sim {

struct Verdict {
  CUresult result = CUDA_SUCCESS;
  bool skip = false;  // answer `result` without doing anything
};

class Faults {
 public:
  static Faults& instance();

  Verdict enter(const char* call);
  bool set(const std::string& rules);  // replaces all rules; false when they cannot be read
  uint64_t calls(const std::string& name);
  uint64_t injected();
  std::string log();
  void clear_log();

 private:
  struct Rule {
    std::string call;
    uint64_t first = 1;
    uint64_t count = UINT64_MAX;
    CUresult result = CUDA_SUCCESS;
    unsigned delay_ms = 0;
    bool skip = false;
    uint64_t seen = 0;
    bool matches(const char* name) const;
  };

  Faults();
  static bool parse(const std::string& text, std::vector<Rule>& rules, uint64_t& seed, unsigned& per_mille);
  bool replace(const std::string& rules);
  void read_control();
  Verdict judge(const char* call, unsigned& delay_ms);
  bool seeded_failure();

  std::mutex mutex_;
  std::vector<Rule> rules_;
  uint64_t seed_ = 0;
  unsigned per_mille_ = 0;
  std::string control_;
  std::map<std::string, uint64_t> calls_;
  uint64_t injected_ = 0;
  std::vector<std::string> log_;
};

}  // namespace sim

// First line of every exported call: counts it, delays it, or answers for it.
#define SIM_ENTER(call)                                                        \
  do {                                                                         \
    const ::sim::Verdict verdict_ = ::sim::Faults::instance().enter(call);     \
    if (verdict_.skip) return verdict_.result;                                 \
  } while (0)
