// After a kernel's source, which defines KERNEL, DYNAMIC_BYTES, STATIC_BYTES, THREADS and Params: runs a grid of it.
namespace host {

inline const Params* params;

inline void begin() {
    KERNEL(*params);
    now->done = true;
    swapcontext(&now->context, &scheduler);
}

inline void draw_slow() {
    for (auto& cta : ctas) {
        cta->slow = dice() % 3 == 0;
        for (Warp& w : cta->warps) w.slow = dice() % 3 == 0;
    }
}

inline void finish_a_copy(Cta& cta) {
    const size_t at = dice() % cta.copies.size();
    const Copy copy = cta.copies[at];
    cta.copies.erase(cta.copies.begin() + at);
    memcpy(cta.shared.data() + copy.to, copy.from, copy.bytes);
    Mbarrier& b = cta.barriers.at(copy.barrier);
    b.bytes -= int(copy.bytes);
    b.settle();
}

}  // namespace host

// Fibers that never ended (0: all did), -1 where a copy was never waited for, -2 where a thread broke a rule.
// patience: turns in a row without progress after which the kernel counts as hanging.
extern "C" int run_on_host(const Params* params, int blocks, u32 seed, long patience) {
    using namespace host;
    host::params = params;
    grid.x = blocks;
    broken = nullptr;
    dice.seed(seed);
    ctas.clear();
    cluster = {};
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (int block = 0; block < blocks; ++block) {
        ctas.push_back(std::make_unique<Cta>());
        Cta& cta = *ctas.back();
        cta.shared.assign(DYNAMIC_BYTES + STATIC_BYTES, 0xCD);
        cta.warps.resize(THREADS / 32);
        cta.running = THREADS;
        for (int thread = 0; thread < THREADS; ++thread) {
            fibers.push_back(std::make_unique<Fiber>());
            Fiber& fiber = *fibers.back();
            fiber.stack.resize(48 * 1024);
            fiber.cta = &cta;
            fiber.thread.x = thread;
            fiber.block.x = block;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, begin, 0);
        }
    }
    size_t left = fibers.size();
    long idle = 0;
    for (long turn = 0; left > 0; ++turn) {
        if (turn % 20000 == 0) draw_slow();
        const size_t at = dice() % fibers.size(), first = at / 32 * 32;
        Cta& cta = *fibers[at]->cta;
        if (!cta.copies.empty() && dice() % (cta.slow ? 400 : 40) == 0) finish_a_copy(cta), idle = 0;
        bool progress = false;
        if (!(cta.slow || cta.warps[fibers[at]->thread.x / 32].slow) || dice() % 8 == 0) {
            for (size_t lane = 0; lane < 32; ++lane) {
                Fiber& fiber = *fibers[first + (at + lane) % 32];
                if (fiber.done || (fiber.ready && !fiber.ready())) continue;
                now = &fiber;
                swapcontext(&scheduler, &fiber.context);
                if (broken) {
                    fprintf(stderr, "kernel on host: %s\n", broken);
                    return -2;
                }
                left -= fiber.done, fiber.cta->running -= fiber.done;
                progress = true;
            }
        }
        idle = progress ? 0 : idle + 1;
        if (idle > patience) return int(left);
    }
    for (const auto& cta : ctas) {
        if (!cta->copies.empty()) return -1;
    }
    return 0;
}
