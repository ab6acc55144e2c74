#include <exception>
#include <new>
#include <string>

#include "bindings/interrupt.hpp"
#include "bindings/register.hpp"
#include "bindings/text.hpp"
#include "moeshard/error.hpp"

namespace py = pybind11;

bool python_signal_pending() {
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

void register_error(py::module_& m) {
    static const py::exception<moeshard::Error> error(m, "MoeshardError");
    // A signal handler or a callback that raised is why the core gave up: its exception is the better one. What is said
    // may name a file, or repeat metadata, that is no UTF-8.
    static const auto raise = [](const std::string& what) {
        if (!PyErr_Occurred()) PyErr_SetObject(error.ptr(), to_str(what).ptr());
    };
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const moeshard::Error& e) {
            raise(e.what());
        } catch (const py::builtin_exception&) {
            throw;  // what the bindings themselves say of arguments
        } catch (const py::error_already_set&) {
            throw;
        } catch (const std::bad_alloc&) {
            raise("out of memory");
        } catch (const std::exception& e) {
            raise(std::string("inside llama.cpp: ") + e.what());  // which throws what it likes
        }
    });
}
