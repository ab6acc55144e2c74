#include <exception>
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
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const moeshard::Error& e) {
            // A signal handler or a callback that raised is why the core gave up: its exception is the better one.
            // It may name a file whose name is no UTF-8.
            if (!PyErr_Occurred()) PyErr_SetObject(error.ptr(), to_str(e.what()).ptr());
        } catch (const py::builtin_exception&) {
            throw;  // what the bindings themselves say of arguments
        } catch (const py::error_already_set&) {
            throw;
        } catch (const std::exception& e) {
            // The engine throws what it likes: std::out_of_range from a tokenizer, std::bad_alloc.
            const std::string said = std::string("inside llama.cpp: ") + e.what();
            if (!PyErr_Occurred()) PyErr_SetObject(error.ptr(), to_str(said).ptr());
        }
    });
}
