#include "nvrtc.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <memory>

#include "errors.h"
#include "launch.h"

namespace dak {

namespace py = pybind11;

namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorKind::Compilation, message); }

void* open_library(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = dlerror();
    fail("cannot open " + path + ": " + (reason ? reason : "unknown reason"));
  }
  return handle;
}

template <class Function>
void find(void* library, const std::string& path, const char* symbol, Function& out) {
  out = reinterpret_cast<Function>(dlsym(library, symbol));
  if (out == nullptr) fail(path + " has no " + symbol + "; CUDA 12.0 or newer is needed");
}

}  // namespace

Nvrtc::Nvrtc(const std::string& library, const std::string& builtins) : path_(library) {
  // never closed: the compiler keeps threads and static state of its own
  if (!builtins.empty()) open_library(builtins);
  void* handle = open_library(library);
  find(handle, path_, "nvrtcVersion", call_.version);
  find(handle, path_, "nvrtcGetErrorString", call_.error_string);
  find(handle, path_, "nvrtcCreateProgram", call_.create_program);
  find(handle, path_, "nvrtcDestroyProgram", call_.destroy_program);
  find(handle, path_, "nvrtcAddNameExpression", call_.add_name_expression);
  find(handle, path_, "nvrtcCompileProgram", call_.compile_program);
  find(handle, path_, "nvrtcGetProgramLogSize", call_.log_size);
  find(handle, path_, "nvrtcGetProgramLog", call_.log);
  find(handle, path_, "nvrtcGetCUBINSize", call_.cubin_size);
  find(handle, path_, "nvrtcGetCUBIN", call_.cubin);
  find(handle, path_, "nvrtcGetLoweredName", call_.lowered_name);
}

void Nvrtc::check(int status, const char* call, const std::string& log) const {
  if (status == 0) return;
  const char* text = call_.error_string(status);
  std::string message = std::string(call) + " failed: " + (text ? text : "unknown error");
  if (!log.empty()) message += "\n" + log;
  fail(message);
}

std::string Nvrtc::program_log(Program program) const {
  size_t size = 0;
  if (call_.log_size(program, &size) != 0 || size <= 1) return "";
  std::string log(size, '\0');
  if (call_.log(program, log.data()) != 0) return "";
  log.resize(size - 1);  // without the terminating zero
  return log;
}

std::pair<int, int> Nvrtc::version() const {
  int major = 0;
  int minor = 0;
  check(call_.version(&major, &minor), "nvrtcVersion");
  return {major, minor};
}

CompiledKernel Nvrtc::compile(const std::string& source, const std::string& file,
                              const std::vector<std::pair<std::string, std::string>>& headers,
                              const std::vector<std::string>& options,
                              const std::string& expression) const {
  std::vector<const char*> names;
  std::vector<const char*> texts;
  for (const auto& [name, text] : headers) {
    names.push_back(name.c_str());
    texts.push_back(text.c_str());
  }
  std::vector<const char*> flags;
  for (const std::string& option : options) flags.push_back(option.c_str());

  Program program = nullptr;
  check(call_.create_program(&program, source.c_str(), file.c_str(),
                             static_cast<int>(headers.size()), texts.data(), names.data()),
        "nvrtcCreateProgram");
  const auto destroy = [this](ProgramObject* object) { call_.destroy_program(&object); };
  const std::unique_ptr<ProgramObject, decltype(destroy)> owner(program, destroy);

  check(call_.add_name_expression(program, expression.c_str()), "nvrtcAddNameExpression");
  const int status = call_.compile_program(program, static_cast<int>(flags.size()), flags.data());
  CompiledKernel result;
  result.log = program_log(program);
  check(status, "nvrtcCompileProgram", result.log);

  const char* lowered = nullptr;
  check(call_.lowered_name(program, expression.c_str(), &lowered), "nvrtcGetLoweredName",
        result.log);
  result.lowered_name = lowered;
  size_t size = 0;
  check(call_.cubin_size(program, &size), "nvrtcGetCUBINSize");
  if (size == 0) {
    fail("no cubin for " + expression + ": name a real architecture (sm_90a), not a virtual one");
  }
  result.cubin.resize(size);
  check(call_.cubin(program, result.cubin.data()), "nvrtcGetCUBIN");
  return result;
}

void bind_nvrtc(py::module_& m) {
  py::class_<Nvrtc>(m, "Nvrtc", "An open libnvrtc.")
      .def(py::init<const std::string&, const std::string&>(), py::arg("library"), py::kw_only(),
           py::arg("builtins") = "")
      .def_property_readonly("version", &Nvrtc::version, "(major, minor)")
      .def(
          "compile",
          [](const Nvrtc& self, const std::string& source, const std::string& file,
             const std::vector<std::pair<std::string, std::string>>& headers,
             const std::vector<std::string>& options, const std::string& expression) {
            CompiledKernel result;
            {
              const py::gil_scoped_release release;
              result = self.compile(source, file, headers, options, expression);
            }
            return py::make_tuple(py::bytes(result.cubin), result.lowered_name, result.log);
          },
          py::kw_only(), py::arg("source"), py::arg("file"), py::arg("headers"),
          py::arg("options"), py::arg("expression"),
          "Compile to (cubin, symbol, log). Raises CompilationError with the compiler's log.");

  bind_launch(m);
}

}  // namespace dak
