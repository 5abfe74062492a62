//! What the kernels do of what the machine could: `cargo bench -p hfcore-kernels [-- FILTER]`, 2 threads unless
//! HFCORE_THREADS says otherwise; HFCORE_ISA names another instruction set, HFCORE_INPUTS and HFCORE_OUTPUTS other sizes,
//! HFCORE_ROWS one number of rows. Best of several runs; a probe, not a report: that is `hfcore bench`.

use std::time::Instant;

use hfcore_kernels::activations::{ActBlock, Activations, Scales, quantize_rows, round_rows};
use hfcore_kernels::attention::{
    AttentionInput, AttentionPlan, AttentionShape, KvLayer, KvType, PAGE, Span, attend,
};
use hfcore_kernels::matmul::{Matrix, Store, matmul};
use hfcore_kernels::pool::Pool;
use hfcore_kernels::quant::TensorType;
use hfcore_kernels::simd::Isa;
use hfcore_kernels::tile::Tiles;

/// A small deterministic generator; benchmarks need no crate for it.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 31) as f32 * 2.0 - 1.0
    }
}

/// The least of the times that `f` takes, in seconds.
fn best(mut f: impl FnMut()) -> f64 {
    let mut least = f64::MAX;
    let start = Instant::now();
    let mut runs = 0;
    while runs < 5 || (start.elapsed().as_secs_f64() < 0.4 && runs < 200) {
        let at = Instant::now();
        f();
        least = least.min(at.elapsed().as_secs_f64());
        runs += 1;
    }
    least
}

/// Matrices enough of one type that they do not fit the caches together.
fn matmuls(isa: Isa, pool: &Pool, tensor_type: TensorType, random: &mut Random) {
    let width = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|n| n.parse().ok())
            .unwrap_or(2048)
    };
    let (outputs, inputs) = (width("HFCORE_OUTPUTS"), width("HFCORE_INPUTS"));
    let bytes: Vec<u8> = (0..outputs * tensor_type.row_bytes(inputs).unwrap_or(0))
        .map(|_| random.next() as u8 & 0x3B)
        .collect();
    let count = 256_000_000usize.div_ceil(bytes.len()).min(96);
    let matrices: Vec<Matrix> = (0..count)
        .map(|_| {
            let tiles = Tiles::pack(tensor_type, outputs, inputs, &bytes, pool);
            Matrix::new(vec![tiles], None)
        })
        .collect();
    let size: usize = matrices.iter().map(Matrix::bytes).sum();
    let mut line = format!("{tensor_type:?}:");
    let mut one = 0.0;
    let only = std::env::var("HFCORE_ROWS")
        .ok()
        .and_then(|n| n.parse().ok());
    for rows in [1, 2, 4, 8, 16, 64, 512] {
        if only.is_some_and(|only: usize| rows != only) {
            continue;
        }
        let x: Vec<f32> = (0..rows * inputs).map(|_| random.float()).collect();
        let mut blocks = vec![ActBlock::default(); x.len() / 32];
        let scales = matrices[0].scales().unwrap_or(Scales::Block);
        quantize_rows(isa, pool, &x, inputs, scales, &mut blocks);
        let mut pairs = vec![[0; 2]; rows * inputs.div_ceil(2)];
        round_rows(isa, pool, &x, inputs, &mut pairs);
        let mut out = vec![0.0; rows * outputs];
        let used = if rows > 16 { count.min(2) } else { count };
        let time = best(|| {
            for matrix in &matrices[..used] {
                let x = Activations {
                    rows,
                    floats: &x,
                    pairs: &pairs,
                    blocks: &blocks,
                    supers: &blocks,
                };
                matmul(isa, pool, matrix, x, Store::Set, &mut out);
            }
        });
        if rows == 1 {
            one = time;
            line += &format!(" 1 row {:.1} GB/s", size as f64 / time / 1e9);
        } else if rows <= 16 {
            line += &format!(", {rows}: x{:.2}", time / one);
        } else {
            let ops = 2.0 * (used * outputs * inputs * rows) as f64;
            line += &format!(", {rows}: {:.2} TOPS", ops / time / 1e12);
        }
    }
    println!("{line}");
}

fn attention(
    isa: Isa,
    pool: &Pool,
    kind: KvType,
    (heads, kv_heads, head_dim): (usize, usize, usize),
) {
    let mut random = Random(3);
    let shape = AttentionShape {
        heads,
        kv_heads,
        head_dim,
        scale: 0.1,
        softcap: None,
        window: None,
    };
    let width = (heads + 2 * kv_heads) * head_dim;
    let mut line = format!("attention {heads}/{kv_heads}x{head_dim} {kind:?}:");
    for (start, rows) in [(0usize, 512usize), (3584, 512), (512, 1), (4095, 1)] {
        let length = start + rows;
        let pages: Vec<u32> = (0..length.div_ceil(PAGE) as u32).collect();
        // Several layers, that decode reads from memory as a model's would be.
        let layers = if rows == 1 { 16 } else { 1 };
        let mut caches: Vec<KvLayer> = (0..layers)
            .map(|_| KvLayer::new(kind, pages.len(), kv_heads, head_dim))
            .collect();
        let all: Vec<f32> = (0..length * width).map(|_| random.float()).collect();
        let span = |start, rows| Span {
            first_row: 0,
            rows,
            first_page: 0,
            pages: pages.len(),
            start,
            long: false,
        };
        for cache in &mut caches {
            cache.store(
                isa,
                pool,
                &[span(0, length)],
                &pages,
                &all,
                width,
                heads * head_dim,
            );
        }
        let input = AttentionInput {
            spans: &[span(start, rows)],
            pages: &pages,
            q: &all[..rows * width],
            width,
        };
        let mut plan = AttentionPlan::default();
        let mut out = vec![0.0; rows * heads * head_dim];
        let time = best(|| {
            for cache in &caches {
                attend(isa, pool, &mut plan, &shape, cache, &input, &mut out);
            }
        }) / layers as f64;
        if rows == 1 {
            let bytes = pages.len() * KvLayer::page_bytes(kind, kv_heads, head_dim);
            let rate = bytes as f64 / time / 1e9;
            line += &format!(" decode at {start}: {:.0} us, {rate:.1} GB/s;", 1e6 * time);
        } else {
            let seen: usize = (start + 1..=length).sum();
            let flops = 4.0 * (seen * heads * head_dim) as f64;
            let rate = flops / time / 1e9;
            line += &format!(
                " prefill at {start}: {:.2} ms, {rate:.0} GFLOPS;",
                1e3 * time
            );
        }
    }
    println!("{line}");
}

fn quantising(isa: Isa, pool: &Pool) {
    let mut random = Random(5);
    let x: Vec<f32> = (0..512 * 1536).map(|_| random.float()).collect();
    let mut blocks = vec![ActBlock::default(); x.len() / 32];
    let time = best(|| quantize_rows(isa, pool, &x, 1536, Scales::Block, &mut blocks));
    println!(
        "quantize_rows: {:.3} ns a number",
        1e9 * time / x.len() as f64
    );
}

fn main() {
    let filter: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let threads = std::env::var("HFCORE_THREADS").ok();
    let pool = Pool::new(threads.and_then(|n| n.parse().ok()).unwrap_or(2));
    let isa = Isa::detect();
    let wanted = |name: &str| filter.is_empty() || filter.iter().any(|f| name.contains(f.as_str()));
    println!("{} on {} threads", isa.name(), pool.threads());
    for (heads, kv_heads, head_dim) in [(9, 3, 64), (4, 1, 256), (32, 8, 64), (32, 8, 128)] {
        for kind in [KvType::F16, KvType::Int8] {
            if wanted(&format!("attention {heads}/{kv_heads}x{head_dim} {kind:?}")) {
                attention(isa, &pool, kind, (heads, kv_heads, head_dim));
            }
        }
    }
    if wanted("quantize") {
        quantising(isa, &pool);
    }
    let mut random = Random(7);
    for tensor_type in TensorType::ALL {
        if wanted(&format!("{tensor_type:?}")) {
            matmuls(isa, &pool, tensor_type, &mut random);
        }
    }
}
