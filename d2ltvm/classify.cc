// classify NETWORK IMAGES [LABELS | --logits]: name the digits of a file
#include "library_file.h"

#include <algorithm>
#include <chrono>
#include <iostream>
#include <thread>
#include <vector>

// An IDX file of bytes without its header; axes: all lengths but the first
string idx(const string& path, const std::vector<size_t>& axes) {
  string file = read(path);
  size_t header = 8 + 4 * axes.size(), each = 1;
  auto length = [&](size_t at) {
    size_t value = 0;
    for (size_t i = at; i < at + 4; ++i)
      value = value << 8 | (unsigned char)file[i];
    return value;
  };
  require(file.size() >= header && file.compare(
              0, 4, string{0, 0, 8, char(1 + axes.size())}) == 0,
          path + ": not an IDX file of bytes with " +
          std::to_string(1 + axes.size()) + " axes");
  for (size_t i = 0; i < axes.size(); each *= axes[i++])
    require(length(8 + 4 * i) == axes[i], path + ": expected axes of length " +
            std::to_string(axes[i]) + " after the first");
  require(file.size() == header + length(4) * each, path + ": expected " +
          std::to_string(length(4)) + " times " + std::to_string(each) +
          " bytes after the header");
  return file.substr(header);
}

struct Aligned {  // memory that starts at a multiple of 64 bytes
  void AllocData(DLTensor* t) {
    t->data = std::aligned_alloc(64, (ffi::GetDataSize(*t) + 63) / 64 * 64);
  }
  void FreeData(DLTensor* t) { std::free(t->data); }
};

ffi::Tensor floats(int64_t images) {
  return ffi::Tensor::FromNDAlloc(Aligned(), {images, 1, 28, 28},
                                  {kDLFloat, 32, 1}, {kDLCPU, 0});
}

struct Network {
  ffi::Module vm;
  ffi::Function run;
  size_t batch;  // images per call; 0: any number
};

Network open(const string& path) {
  string content = read(path);
  Facts facts = read_colophon(content, path);
  check_facts(facts, path);
  auto threads = std::min<unsigned long>(
      std::stoul(facts["threads"]), std::thread::hardware_concurrency());
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 0);  // if unset
  auto unpack = load(content, path)->GetFunction("vm_load_executable");
  require(unpack.has_value(), path + ": holds no network");
  auto vm = unpack.value()().cast<ffi::Module>();
  vm->GetFunction("vm_initialization").value()(int(kDLCPU), 0, 2);
  return {vm, vm->GetFunction("main").value(),
          facts["batch"] == "any" ? 0 : std::stoul(facts["batch"])};
}

int main(int argc, char** argv) try {
  require(argc == 3 || argc == 4,
          "use: classify NETWORK IMAGES [LABELS | --logits]");
  const string option = argc == 4 ? argv[3] : "";
  const bool logits = option == "--logits", judge = argc == 4 && !logits;
  Network network = open(argv[1]);
  string images = idx(argv[2], {28, 28});
  string labels = judge ? idx(option, {}) : "";
  const size_t pixels = 28 * 28, count = images.size() / pixels;
  require(!judge || labels.size() == count, "as many labels as images");

  using Clock = std::chrono::steady_clock;
  std::vector<double> calls;  // microseconds
  size_t right = 0, most = network.batch ? network.batch : 64;
  auto begin = Clock::now();
  for (size_t start = 0; start < count; start += most) {
    size_t part = std::min(most, count - start);
    auto X = floats(network.batch ? network.batch : part);
    float* x = static_cast<float*>(X.data_ptr());
    std::fill(x, x + X.numel(), 0.0f);
    for (size_t i = 0; i < part * pixels; ++i)
      x[i] = (unsigned char)images[start * pixels + i] / 255.0f;
    auto before = Clock::now();
    auto Y = network.run(X).cast<ffi::Tensor>();
    calls.push_back(std::chrono::duration<double, std::micro>(
        Clock::now() - before).count());
    const float* y = static_cast<const float*>(Y.data_ptr());
    for (size_t i = 0; i < part; ++i, y += Y.size(1)) {
      int label = std::max_element(y, y + Y.size(1)) - y;
      if (judge) right += label == labels[start + i];
      else if (!logits) std::cout << label << '\n';
      else for (int64_t k = 0; k < Y.size(1); ++k)
        printf("%.9g%c", y[k], k + 1 < Y.size(1) ? ' ' : '\n');
    }
  }
  std::chrono::duration<double> all = Clock::now() - begin;
  if (judge) std::cout << right << " of " << count << " right\n";
  if (judge && count) {
    std::nth_element(calls.begin(), calls.begin() + calls.size() / 2,
                     calls.end());
    std::cout << calls[calls.size() / 2] << " us a call, "
              << count / all.count() << " images a second\n";
  }
} catch (const std::exception& error) {
  std::cerr << "classify: " << error.what() << '\n';
  return 1;
}
