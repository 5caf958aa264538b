#include "sim/faults.h"

#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <thread>

#include "sim/box.h"

namespace sim {

static constexpr std::size_t kLogMax = 1 << 16;

Faults& Faults::instance() {
  static Faults* const faults = new Faults;  // never destroyed: threads may call to the very end
  return *faults;
}

Faults::Faults() {
  const char* rules = std::getenv("ROTATOR_SIM_FAULTS");
  if (rules != nullptr) replace(rules);
}

bool Faults::Rule::matches(const char* name) const {
  if (call.empty() || call.back() != '*') return call == name;
  return std::strncmp(call.c_str(), name, call.size() - 1) == 0;
}

bool Faults::parse(const std::string& text, std::vector<Rule>& rules, uint64_t& seed, unsigned& per_mille) {
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ';');) {
    if (part.empty()) continue;
    if (part.rfind("seed:", 0) == 0) {
      char* end = nullptr;
      seed = std::strtoull(part.c_str() + 5, &end, 10);
      if (*end != '/') return false;
      per_mille = static_cast<unsigned>(std::strtoul(end + 1, nullptr, 10));
      continue;
    }
    const auto mark = part.find_first_of("@=~!");
    if (mark == std::string::npos) return false;
    Rule rule;
    rule.call = part.substr(0, mark);
    char* at = part.data() + mark;
    if (*at == '@') {
      rule.first = std::strtoull(at + 1, &at, 10);
      rule.count = *at == 'x' ? std::strtoull(at + 1, &at, 10) : 1;
    }
    if (*at == '=') rule.result = static_cast<CUresult>(std::strtol(at + 1, &at, 10));
    else if (*at == '~') rule.delay_ms = static_cast<unsigned>(std::strtoul(at + 1, &at, 10));
    else if (*at != '!') return false;
    rule.skip = rule.delay_ms == 0;
    rules.push_back(rule);
  }
  return true;
}

bool Faults::replace(const std::string& text) {
  std::vector<Rule> rules;
  uint64_t seed = 0;
  unsigned per_mille = 0;
  if (!parse(text, rules, seed, per_mille)) return false;
  rules_ = std::move(rules);
  seed_ = seed;
  per_mille_ = per_mille;
  return true;
}

bool Faults::set(const std::string& text) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return replace(text);
}

void Faults::read_control() {
  Box* box = Box::open();
  if (box == nullptr) return;
  const std::string own = box->control("faults." + std::to_string(getpid()));
  const std::string now = own.empty() ? box->control("faults") : own;
  if (now == control_) return;
  control_ = now;
  replace(now);
}

bool Faults::seeded_failure() {
  if (per_mille_ == 0) return false;
  seed_ = seed_ * 6364136223846793005ULL + 1442695040888963407ULL;
  return (seed_ >> 33) % 1000 < per_mille_;
}

Verdict Faults::judge(const char* call, unsigned& delay_ms) {
  Verdict verdict;
  for (Rule& rule : rules_) {
    if (!rule.matches(call)) continue;
    const uint64_t n = ++rule.seen;
    if (n < rule.first || n - rule.first >= rule.count) continue;
    delay_ms += rule.delay_ms;
    if (rule.skip) verdict = {rule.result, true};
  }
  if (!verdict.skip && seeded_failure()) verdict = {CUDA_ERROR_UNKNOWN, true};
  injected_ += verdict.skip;
  return verdict;
}

Verdict Faults::enter(const char* call) {
  unsigned delay_ms = 0;
  Verdict verdict;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    read_control();
    ++calls_[call];
    ++calls_["*"];
    verdict = judge(call, delay_ms);
    if (log_.size() < kLogMax) log_.emplace_back(verdict.skip ? std::string(call) + "!" : call);
  }
  if (delay_ms != 0) std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
  return verdict;
}

uint64_t Faults::calls(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return calls_[name];
}

uint64_t Faults::injected() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return injected_;
}

std::string Faults::log() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string lines;
  for (const auto& line : log_) lines += line + "\n";
  return lines;
}

void Faults::clear_log() {
  const std::lock_guard<std::mutex> lock(mutex_);
  log_.clear();
}

}  // namespace sim
