// d2ltvm_batch_norm: an operator of MXNet that calls two functions of TVM
//
// From X, gamma, beta, moving_mean, moving_var (which it changes), and the
// options kernels, momentum and eps, to Y and what the backward pass needs.
#include <tvm/ffi/c_api.h>

#define DLPACK_VERSION 13  // MXNet would define DLTensor once more
#include <mxnet/lib_api.h>

#include <sstream>

using namespace mxnet::ext;
using Options = std::unordered_map<std::string, std::string>;
using Tensors = std::vector<MXTensor>;
using Shapes = std::vector<std::vector<unsigned>>;

namespace {

TVMFFIAny any(MXTensor& tensor) {
  TVMFFIAny value{};
  value.type_index = kTVMFFIDLTensorPtr;
  value.v_ptr = &tensor.dltensor;
  return value;
}

TVMFFIAny any(const std::string& number) {
  TVMFFIAny value{};
  value.type_index = kTVMFFIFloat;
  std::istringstream(number) >> value.v_float64;  // in any locale
  return value;
}

MXReturnValue call(const std::string& name, std::vector<TVMFFIAny> values) {
  TVMFFIByteArray key{name.data(), name.size()};
  TVMFFIObjectHandle function = nullptr, error = nullptr;
  if (TVMFFIFunctionGetGlobal(&key, &function) || !function) {
    MX_ERROR_MSG << name << ": TVM has no such function";
    return MX_FAIL;
  }
  TVMFFIAny result{};
  int failed = TVMFFIFunctionCall(function, values.data(), values.size(),
                                  &result);
  TVMFFIObjectDecRef(function);
  if (!failed) return MX_SUCCESS;
  TVMFFIErrorMoveFromRaised(&error);
  const auto& message = TVMFFIErrorGetCellPtr(error)->message;
  MX_ERROR_MSG << name << ": " << std::string(message.data, message.size);
  TVMFFIObjectDecRef(error);
  return MX_FAIL;
}

MXReturnValue forward(const Options& options, Tensors* in, Tensors* out,
                      const OpResource&) {
  Tensors &i = *in, &o = *out;  // X, gamma, beta, mean, var; Y, saved
  return call(options.at("kernels") + ".forward",
              {any(i[0]), any(i[1]), any(i[2]), any(o[0]), any(i[3]),
               any(i[4]), any(o[1]), any(options.at("momentum")),
               any(options.at("eps"))});
}

MXReturnValue backward(const Options& options, Tensors* in, Tensors* out,
                       const OpResource&) {
  Tensors &i = *in, &o = *out;  // dY, dsaved, all in and out of forward
  return call(options.at("kernels") + ".backward",
              {any(i[0]), any(i[2]), any(i[8]), any(o[0]), any(o[1]),
               any(o[2])});
}

MXReturnValue count(const Options& options, int* inputs, int* outputs) {
  for (const char* name : {"kernels", "momentum", "eps"})
    if (!options.count(name)) {
      MX_ERROR_MSG << name << ": expected this option";
      return MX_FAIL;
    }
  *inputs = 5;
  *outputs = 2;
  return MX_SUCCESS;
}

MXReturnValue types(const Options&, std::vector<int>* in,
                    std::vector<int>* out) {
  in->assign(5, kFloat32);
  out->assign(2, kFloat32);
  return MX_SUCCESS;
}

MXReturnValue shapes(const Options&, Shapes* in, Shapes* out) {
  if (in->at(0).size() < 2) {
    MX_ERROR_MSG << "X: expected two axes or more";
    return MX_FAIL;
  }
  unsigned channels = in->at(0)[1];
  for (int i = 1; i < 5; ++i) in->at(i) = {channels};
  *out = {in->at(0), {5, channels}};
  return MX_SUCCESS;
}

MXReturnValue mutated(const Options&, std::vector<int>* inputs) {
  *inputs = {3, 4};
  return MX_SUCCESS;
}

}  // namespace

REGISTER_OP(d2ltvm_batch_norm)
    .setForward(forward, "cpu")
    .setBackward(backward, "cpu")
    .setParseAttrs(count)
    .setInferType(types)
    .setInferShape(shapes)
    .setMutateInputs(mutated);

MXReturnValue initialize(int) { return MX_SUCCESS; }
