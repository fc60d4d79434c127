// Which tiles an item of the persistent grid is. Plain C++, so that a test can run it on the host.
#pragma once

// One CTA's part of an item.
struct Plan {
    int expert, column;  // column: which tile of weight rows
    int row, live;       // first permuted row; how many, 0 .. TOKENS
    bool shared;  // the cluster's CTAs have the same weights and other rows; else the same rows and other weights
};

// Items of an expert: groups of CTAS tiles of rows for every column, then what is left, a tile of rows whose columns
// are taken CTAS at a time. No rows, no items.
template <int CTAS, int TOKENS>
INLINE int count_items(int rows, int columns) {
    const int tiles = (rows + TOKENS - 1) / TOKENS;
    static_assert(CTAS == 1 || CTAS == 2, "with more CTAs there may be more than one last tile");
    return tiles / CTAS * columns + tiles % CTAS * ((columns + CTAS - 1) / CTAS);
}

// expert_offsets [L+1], items_before [L+1]: items of all earlier experts.
template <int CTAS, int TOKENS>
INLINE Plan plan_item(int item, int rank, const int* expert_offsets, const int* items_before, int experts,
                      int columns) {
    int low = 0, high = experts - 1;  // the first expert whose items end after this one; so it has items
    while (low < high) {
        const int middle = (low + high) >> 1;
        if (items_before[middle + 1] <= item)
            low = middle + 1;
        else
            high = middle;
    }
    const int rows = expert_offsets[low + 1] - expert_offsets[low];
    const int tiles = (rows + TOKENS - 1) / TOKENS, groups = tiles / CTAS;
    const int inner = item - items_before[low];
    Plan plan{low, 0, 0, 0, inner < groups * columns};
    int tile = tiles - 1;
    if (plan.shared) {
        plan.column = inner / groups;  // rows before columns: the same weights are read at nearly the same time
        tile = (inner - plan.column * groups) * CTAS + rank;
    } else {
        plan.column = (inner - groups * columns) * CTAS + rank;
    }
    const int left = rows - tile * TOKENS;
    plan.row = expert_offsets[low] + tile * TOKENS;
    plan.live = left < TOKENS ? left : TOKENS;
    if (plan.column >= columns) plan.column = columns - 1, plan.live = 0;  // one of an odd number of columns is left
    return plan;
}
