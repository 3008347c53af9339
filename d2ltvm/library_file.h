// A library file of export_network: read once, checked, then loaded
#pragma once
#include <sys/utsname.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ffi = tvm::ffi;
using std::string;

inline void require(bool good, const string& complaint) {
  if (!good) throw std::runtime_error(complaint);
}

inline string read(const string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  require(file && content << file.rdbuf(),
          path + ": cannot be read, or empty");
  return content.str();
}

inline uint32_t crc32(const char* data, size_t size) {  // that of zlib
  uint32_t table[256], crc = ~0u;
  for (uint32_t i = 0; i < 256; ++i) {
    table[i] = i;
    for (int bit = 0; bit < 8; ++bit)
      table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320u : 0);
  }
  while (size--) crc = crc >> 8 ^ table[(crc ^ *data++) & 255];
  return ~crc;
}

using Facts = std::map<string, string>;

inline Facts read_colophon(const string& file, const string& path) {
  size_t end = file.size() - 33;  // wraps around if the file is shorter
  require(file.size() >= 33 && file.compare(end, 7, "d2ltvm ") == 0,
          path + ": cut short, or not a network of export_network");
  char sum[10];
  snprintf(sum, sizeof sum, "%08x\n", crc32(file.data(), file.size() - 9));
  require(file.compare(end + 24, 9, sum) == 0, path + ": damaged");
  size_t start = std::stoull(file.substr(end + 7, 16), nullptr, 16) + 1;
  std::istringstream lines(file.substr(start, end - start));
  Facts facts;
  for (string line; std::getline(lines, line);) {
    size_t equals = line.find('=');
    facts[line.substr(0, equals)] = line.substr(equals + 1);
  }
  return facts;
}

inline std::set<string> cpu_features() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  string line;
  while (std::getline(cpuinfo, line) && line.compare(0, 5, "flags") &&
         line.compare(0, 8, "Features")) {}
  std::istringstream words(line);
  return {std::istream_iterator<string>(words), {}};
}

inline void check_facts(Facts& facts, const string& path) {
  auto refuse_unless = [&](bool good, const string& complaint) {
    require(good, path + ": " + complaint);
  };
  refuse_unless(facts["format"] == "2",
                "format " + facts["format"] + ", expected 2");
  utsname host;
  uname(&host);
  refuse_unless(facts["machine"] == host.machine, "for " + facts["machine"] +
                ", not for " + host.machine);
  refuse_unless(facts["tvm"] == TVM, "for TVM " + facts["tvm"] +
                ", this is " TVM);
  refuse_unless(facts["device"] == "cpu", "for " + facts["device"] +
                ", this program uses the processor");
  for (auto name : {"batch", "threads"})
    refuse_unless(atoi(facts[name].c_str()) > 0 ||
                  (facts[name] == "any" && name == string("batch")),
                  string("no number in the fact ") + name);
  auto present = cpu_features();
  std::istringstream needs(facts["needs"]);
  for (string feature; needs >> feature;)
    refuse_unless(present.count(feature),
                  "needs a processor with " + feature);
}

// Load the bytes that were checked. Their copy has a new name, for the
// dynamic linker returns what it knows when it sees a name again.
inline ffi::Module load(const string& content, const string& path) {
  struct Copy {
    string name = std::filesystem::temp_directory_path() / "XXXXXX.so";
    ~Copy() { unlink(name.c_str()); }
  } copy;
  int opened = mkstemps(copy.name.data(), 3);
  FILE* file = opened < 0 ? nullptr : fdopen(opened, "wb");
  require(file, copy.name + ": cannot be written");
  bool whole = fwrite(content.data(), 1, content.size(), file) ==
               content.size();
  require(!fclose(file) && whole, copy.name + ": cannot be written");
  try {
    return ffi::Module::LoadFromFile(copy.name);
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": holds no network: " + error.what());
  }
}
