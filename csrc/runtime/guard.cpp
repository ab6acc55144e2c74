#include "runtime/guard.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "engine/control.hpp"
#include "ggml.h"
#include "llama.h"

namespace moeshard {

namespace {

thread_local Guard* innermost = nullptr;

// What MOESHARD_LOG asks to see on stderr: "debug", "info", "warn", "error", "none"; nothing by default.
ggml_log_level shown_level() {
    const char* value = std::getenv("MOESHARD_LOG");
    if (!value) return GGML_LOG_LEVEL_NONE;
    const std::string level = value;
    if (level == "debug") return GGML_LOG_LEVEL_DEBUG;
    if (level == "info") return GGML_LOG_LEVEL_INFO;
    if (level == "warn") return GGML_LOG_LEVEL_WARN;
    if (level == "none") return GGML_LOG_LEVEL_NONE;
    return GGML_LOG_LEVEL_ERROR;
}

// The engine repeats what a file says, and a terminal must not act on it: control characters become question marks.
std::string printable(const char* text) {
    std::string shown;
    for (; *text != '\0'; ++text) {
        const auto byte = static_cast<unsigned char>(*text);
        const bool latin = byte == 0xC2 && (static_cast<unsigned char>(text[1]) & 0xE0) == 0x80;
        const bool control = latin || (byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7F;
        shown += control ? '?' : *text;
        if (latin) ++text;
    }
    return shown;
}

}  // namespace

struct EngineLog {
    static void log(ggml_log_level level, const char* text, void*) {
        static thread_local ggml_log_level last = GGML_LOG_LEVEL_INFO;
        // A continued line has the level of the line it continues.
        if (level != GGML_LOG_LEVEL_CONT) last = level;
        if (innermost && last == GGML_LOG_LEVEL_ERROR) {
            innermost->messages_ += text;  // part of the Error; shown where none comes of it
        } else {
            show(last, text);
        }
    }

    static void show(ggml_log_level level, const char* text) {
        static const ggml_log_level shown = shown_level();
        // Taking a trace makes graphs larger than those that were measured at first, as it should.
        if (level == GGML_LOG_LEVEL_WARN && std::strncmp(text, "~llama_context:", 15) == 0) return;
        if (shown != GGML_LOG_LEVEL_NONE && level >= shown) std::fputs(printable(text).c_str(), stderr);
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

void install_callbacks() { EngineLog::install(); }

Guard::Guard() : outer_(innermost), passed_(hook::exceptions_pass(true)) {
    static std::once_flag once;
    std::call_once(once, llama_backend_init);
    innermost = this;
}

Guard::~Guard() {
    innermost = outer_;
    hook::exceptions_pass(passed_);
    if (!told_ && !messages_.empty()) EngineLog::show(GGML_LOG_LEVEL_ERROR, messages_.c_str());
}

Error Guard::error(const std::string& what) const {
    told_ = true;
    std::string said = messages_;
    while (!said.empty() && (said.back() == '\n' || said.back() == ' ')) said.pop_back();
    return Error(said.empty() ? what : what + "\n" + said);
}

}  // namespace moeshard
