#include "shard/corrected.hpp"

#include <algorithm>

#include "gguf/checked.hpp"
#include "moeshard/error.hpp"
#include "shard/holder.hpp"

namespace moeshard {

namespace shard {

void replace_tensors(NewFile& file, const Corrected& corrected) {
    for (const std::string& name : corrected.names) {
        const gguf::Tensor& own = corrected.file->tensor(name);
        const auto at = std::find_if(file.tensors.begin(), file.tensors.end(),
                                     [&](const NewTensor& tensor) { return tensor.name == name; });
        if (at == file.tensors.end()) {
            throw Error(corrected.file->path() + ": tensor '" + gguf::printable(name) +
                        "' is none of the shard's; it was made for another model");
        }
        if (own.ne != at->ne) {
            throw Error(corrected.file->path() + ": tensor '" + gguf::printable(name) + "' is of another shape, " +
                        own.shape() + ", than the shard's; it was made for other experts or another model");
        }
        NewTensor replaced = copy_tensor(*corrected.file, own);
        replaced.n_dims = at->n_dims;
        *at = std::move(replaced);
    }
}

}  // namespace shard

SegmentList tensor_file(const std::vector<std::pair<std::string, std::string>>& entries,
                        std::vector<LiteralTensor> tensors, const std::string& name) {
    shard::NewFile file;
    for (const auto& [key, text] : entries) file.entries.emplace_back().emplace_back(shard::string_entry(key, text));
    for (LiteralTensor& tensor : tensors) {
        shard::NewTensor& own = file.tensors.emplace_back();
        own.name = std::move(tensor.name);
        own.type = tensor.type;
        own.n_dims = tensor.n_dims;
        own.ne = tensor.ne;
        own.nbytes = tensor.bytes.size();
        own.data.emplace_back(std::move(tensor.bytes));
    }
    return std::move(shard::assemble(std::move(file), 0, name, {}).front());
}

}  // namespace moeshard
