"""transformers on PyTorch: generation and scoring as its documentation and lm-evaluation-harness do them.

The ordinary best of it: inference mode, scaled-dot-product attention, key-value caches, logits of the last token only where
no others are asked for, all cores.
"""

import copy

import numpy as np
import torch
import work
from model import PAD
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation import ContinuousBatchingConfig
from worker import Job, main


def load(job: Job):
    torch.set_num_threads(work.cores())
    return AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32, attn_implementation="sdpa").eval()


class Lengths(StoppingCriteria):
    """Ends every row at a length of its own, as its end token would: what follows is padding, and the batch goes on until its
    last row has ended."""

    def __init__(self, prompt: int, lengths):
        self.ends = prompt + torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


class Sampler:
    """model.generate on rows of ids, padded on the left."""

    def __init__(self, job: Job):
        self.model, self.top_p = load(job), job.sizes.top_p
        first = torch.from_numpy(work.generate(job.sizes)[:1]).long()
        with torch.inference_mode():
            greedy = self.model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=8, do_sample=False)
        self.check = {"check": greedy[0, first.shape[1] :].tolist()}

    def __call__(self, rows, new: int, **options):
        width = max(map(len, rows))
        ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
        for i, row in enumerate(rows):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.from_numpy(np.asarray(row)), 1
        options |= {"do_sample": True, "top_p": self.top_p, "temperature": 1.0, "top_k": 0, "pad_token_id": PAD}
        with torch.inference_mode():
            return self.model.generate(ids, attention_mask=mask, max_new_tokens=new, return_dict_in_generate=True, **options)


def generate(job: Job, turns):
    sample, s, prompts = Sampler(job), job.sizes, work.generate(job.sizes)

    def run():
        out = sample(prompts, s.new).sequences
        return {"tokens": out[:, s.prompt :].numel()} | sample.check

    turns.repeat(run)


def mixed(job: Job, turns):
    """Batches as the records come."""
    sample, s = Sampler(job), job.sizes
    prompts, lengths = work.mixed(s)

    def run(records: int = s.records):
        made = 0
        for at in range(0, records, s.rows):
            rows, ends = prompts[at : at + s.rows], lengths[at : at + s.rows]
            width = max(map(len, rows))
            out = sample(rows, int(ends.max()), stopping_criteria=StoppingCriteriaList([Lengths(width, ends)]))
            made += sum(min(int(n), out.sequences.shape[1] - width) for n in ends)
        return {"tokens": made} | sample.check

    turns.repeat(run, lambda: run(s.rows))


def mixed_continuous(job: Job, turns):
    """transformers' continuous batching, as many requests at a time as the others have rows; the cache is allocated before."""
    sample, s = Sampler(job), job.sizes
    prompts, lengths = work.mixed(s)
    config = ContinuousBatchingConfig(max_requests_per_batch=s.rows, num_blocks=4 * s.rows)
    how = GenerationConfig(do_sample=True, top_p=s.top_p, temperature=1.0, top_k=0, eos_token_id=-1, pad_token_id=PAD)
    manager = sample.model.init_continuous_batching(generation_config=how, continuous_batching_config=config)
    manager.start()

    def run(records: int = s.records):
        for prompt, n in zip(prompts[:records], lengths, strict=False):
            manager.add_request(prompt.tolist(), max_new_tokens=int(n))
        made, ended = 0, 0
        while ended < records:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended early")
            if result is not None and result.is_finished():
                made, ended = made + len(result.generated_tokens), ended + 1
        return {"tokens": made} | sample.check

    turns.repeat(run, lambda: run(s.rows))


def critique(job: Job, turns, cached: bool = False):
    """Two calls on whole contexts; or the prefix's cache once, a copy of it for every batch, kept for the second call."""
    sample, s = Sampler(job), job.sizes
    prefix, dialogues, requests = work.critique(s)

    def prefill():
        cache = DynamicCache(config=sample.model.config)
        with torch.inference_mode():
            ids = torch.from_numpy(prefix).long()[None]
            return sample.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def run():
        first = prefill() if cached else None
        for at in range(0, s.critiques, s.rows):
            rows, options = [np.concatenate([prefix, d]) for d in dialogues[at : at + s.rows]], {}
            if cached:
                options["past_key_values"] = cache = copy.deepcopy(first)
                cache.batch_repeat_interleave(len(rows))
            out = sample(rows, s.turn, **options)
            if cached:
                options["past_key_values"] = out.past_key_values
            rows = [np.concatenate(parts) for parts in zip(out.sequences.numpy(), requests[at : at + s.rows], strict=True)]
            sample(rows, s.turn, **options)
        return {"tokens": 2 * s.critiques * s.turn} | sample.check

    turns.repeat(run)


def options(job: Job, turns):
    """lm-evaluation-harness: every option behind every context is a row, log-softmax of all logits, gather."""
    model, s = load(job), job.sizes
    rows = torch.from_numpy(work.option_rows(s)).long()

    @torch.inference_mode()
    def run():
        total = 0.0
        for part in rows.split(s.rows):
            logp = torch.log_softmax(model(part[:, :-1], use_cache=False).logits, dim=-1)[:, -s.option :]
            total += logp.gather(-1, part[:, -s.option :, None]).sum().item()
        return {"rows": len(rows), "check": total}

    turns.repeat(run)


def options_shared(job: Job, turns):
    """Every context once, with its cache; then the options behind it, all but their last token, on copies of the cache."""
    model, s = load(job), job.sizes
    contexts, chosen = torch.from_numpy(work.option_contexts(s)).long(), torch.from_numpy(work.options(s)[3]).long()

    @torch.inference_mode()
    def run():
        total = 0.0
        for part in contexts.split(s.rows):
            out = model(part, use_cache=True, logits_to_keep=1)
            first = torch.log_softmax(out.logits[:, 0], dim=-1)[:, chosen[:, 0]]
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(chosen))
            behind = chosen.repeat(len(part), 1)
            rest = torch.log_softmax(model(behind[:, :-1], past_key_values=cache, use_cache=True).logits, dim=-1)
            total += (first.sum() + rest.gather(-1, behind[:, 1:, None]).sum()).item()
        return {"rows": 2 * len(contexts), "check": total}

    turns.repeat(run)


def logprobs(job: Job, turns):
    """One forward, then TRL's selective_log_softmax, which goes row by row through the full logits."""
    from trl.trainer.utils import selective_log_softmax

    model, ids = load(job), torch.from_numpy(work.logprobs(job.sizes)).long()
    turns.loaded()

    @torch.inference_mode()
    def run():
        check = 0.0
        for rows in ids:
            logits = model(rows, use_cache=False).logits
            check += selective_log_softmax(logits[:, :-1], rows[:, 1:]).sum().item()
            del logits  # else two batches of them are in memory
        return {"tokens": ids.numel(), "check": check}

    turns.repeat(run)


def products(job: Job, turns):
    torch.set_num_threads(work.cores())
    n = 256 if job.sizes is work.SMALL else 4096
    a = torch.ones(n, n)

    def run():
        torch.mm(a, a)
        return {"operations": 2 * n**3}

    turns.repeat(run)


def decode(job: Job, turns):
    sample, s, prompts = Sampler(job), job.sizes, work.generate(job.sizes)
    turns.repeat(lambda: work.step_of(lambda new: sample(prompts, new), s) | sample.check)


def step_products(job: Job, turns):
    torch.set_num_threads(work.cores())
    shapes, rows = work.decode_matrices(job.sizes), job.sizes.rows
    matrices = [torch.rand(shape) for shape in shapes]
    inputs = {n: torch.rand(rows, n) for _, n in shapes}

    def multiply():
        with torch.inference_mode():
            for matrix in matrices:
                torch.nn.functional.linear(inputs[matrix.shape[1]], matrix)

    turns.repeat(lambda: work.products_alone(multiply))


WORKLOADS = {
    "generate": generate,
    "mixed": mixed,
    "mixed:continuous": mixed_continuous,
    "critique": critique,
    "critique:cached": lambda job, turns: critique(job, turns, cached=True),
    "options": options,
    "options:shared": options_shared,
    "logprobs": logprobs,
    "products": products,
    "decode": decode,
    "decode:products": step_products,
}

if __name__ == "__main__":
    main(WORKLOADS, "torch", "transformers", "trl")
