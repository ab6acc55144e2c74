#include "runtime/guard.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "engine/control.hpp"
#include "files/threads.hpp"
#include "ggml.h"
#include "llama.h"
#include "moeshard/process.hpp"

namespace moeshard {

namespace {

thread_local Guard* innermost = nullptr;

// What MOESHARD_LOG asks to see on stderr: "debug", "info", "warn", "error"; nothing by default.
ggml_log_level shown_level() {
    const char* value = std::getenv("MOESHARD_LOG");
    if (!value) return GGML_LOG_LEVEL_NONE;
    const std::string level = value;
    if (level == "debug") return GGML_LOG_LEVEL_DEBUG;
    if (level == "info") return GGML_LOG_LEVEL_INFO;
    if (level == "warn") return GGML_LOG_LEVEL_WARN;
    return GGML_LOG_LEVEL_ERROR;
}

}  // namespace

struct EngineLog {
    static void log(ggml_log_level level, const char* text, void*) {
        static const ggml_log_level shown = shown_level();
        static thread_local ggml_log_level last = GGML_LOG_LEVEL_INFO;
        // A continued line has the level of the line it continues.
        if (level != GGML_LOG_LEVEL_CONT) last = level;
        if (shown != GGML_LOG_LEVEL_NONE && last >= shown) std::fputs(text, stderr);
        if (innermost && last == GGML_LOG_LEVEL_ERROR) innermost->messages_ += text;
    }

    static void abort(const char* message) {
        if (innermost) throw EngineAbort(innermost->error(std::string("llama.cpp aborted: ") + message).what());
        std::fprintf(stderr, "%s\n", message);
    }

    static void install() {
        static std::once_flag once;
        std::call_once(once, [] {
            llama_log_set(log, nullptr);
            ggml_set_abort_callback(abort);
        });
    }
};

int default_threads(const std::string& root) { return files::usable_processors(root); }

void take_over_engine_callbacks() { EngineLog::install(); }

Guard::Guard() : outer_(innermost), passed_(hook::exceptions_pass(true)) {
    static std::once_flag once;
    std::call_once(once, llama_backend_init);
    innermost = this;
}

Guard::~Guard() {
    innermost = outer_;
    hook::exceptions_pass(passed_);
}

Error Guard::error(const std::string& what) const {
    std::string said = messages_;
    while (!said.empty() && (said.back() == '\n' || said.back() == ' ')) said.pop_back();
    return Error(said.empty() ? what : what + "\n" + said);
}

}  // namespace moeshard
