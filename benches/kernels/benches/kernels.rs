//! What the kernels do: `cargo bench -p hfcore-benches [-- FILTER]`, on 2 threads unless HFCORE_THREADS says otherwise;
//! HFCORE_ISA names another instruction set, HFCORE_INPUTS and HFCORE_OUTPUTS other sizes of a matrix. Bytes of weights or
//! cache per second where reading them is what takes time, products and sums per second where computing is.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
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

fn number(name: &str, usual: usize) -> usize {
    let given = std::env::var(name).ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(usual)
}

fn pool() -> Pool {
    Pool::new(number("HFCORE_THREADS", 2))
}

/// Matrices enough of one type that they do not fit the caches together.
fn matrices(tensor_type: TensorType, outputs: usize, inputs: usize, pool: &Pool) -> Vec<Matrix> {
    let mut random = Random(7);
    let bytes: Vec<u8> = (0..outputs * tensor_type.row_bytes(inputs).unwrap_or(0))
        .map(|_| random.next() as u8 & 0x3B)
        .collect();
    let count = 256_000_000usize.div_ceil(bytes.len()).min(96);
    let pack = |_| Tiles::pack(tensor_type, outputs, inputs, &bytes, pool);
    (0..count)
        .map(|i| Matrix::new(vec![pack(i)], None))
        .collect()
}

fn matmuls(c: &mut Criterion) {
    let (isa, pool) = (Isa::detect(), pool());
    let (outputs, inputs) = (
        number("HFCORE_OUTPUTS", 2048),
        number("HFCORE_INPUTS", 2048),
    );
    let mut random = Random(9);
    for tensor_type in TensorType::ALL {
        let mut group = c.benchmark_group(format!("matmul {tensor_type:?}"));
        // Made when the first benchmark of the type runs: a filter may leave them all out.
        let mut made: Option<Vec<Matrix>> = None;
        for rows in [1, 2, 4, 8, 16, 64, 512] {
            let x: Vec<f32> = (0..rows * inputs).map(|_| random.float()).collect();
            group.throughput(match rows {
                ..=16 => Throughput::Bytes(
                    tensor_type.row_bytes(inputs).unwrap_or(0) as u64 * outputs as u64,
                ),
                _ => Throughput::Elements(2 * (outputs * inputs * rows) as u64),
            });
            group.bench_function(BenchmarkId::new("rows", rows), |b| {
                let matrices =
                    made.get_or_insert_with(|| matrices(tensor_type, outputs, inputs, &pool));
                let mut blocks = vec![ActBlock::default(); x.len() / 32];
                let scales = matrices[0].scales().unwrap_or(Scales::Block);
                quantize_rows(isa, &pool, &x, inputs, scales, &mut blocks);
                let mut pairs = vec![[0; 2]; rows * inputs.div_ceil(2)];
                round_rows(isa, &pool, &x, inputs, false, &mut pairs);
                let mut out = vec![0.0; rows * outputs];
                let mut next = (0..matrices.len()).cycle();
                b.iter(|| {
                    let x = Activations {
                        rows,
                        floats: &x,
                        pairs: &pairs,
                        blocks: &blocks,
                        supers: &blocks,
                    };
                    let matrix = &matrices[next.next().unwrap_or(0)];
                    matmul(isa, &pool, matrix, x, Store::Set, black_box(&mut out));
                });
            });
        }
    }
}

fn attention(c: &mut Criterion) {
    for (heads, kv_heads, head_dim) in [(9, 3, 64), (4, 1, 256), (32, 8, 64), (32, 8, 128)] {
        for kind in [KvType::F16, KvType::Int8] {
            attention_of(c, kind, heads, kv_heads, head_dim);
        }
    }
}

fn attention_of(c: &mut Criterion, kind: KvType, heads: usize, kv_heads: usize, head_dim: usize) {
    let (isa, pool) = (Isa::detect(), pool());
    let mut random = Random(3);
    let shape = AttentionShape {
        heads,
        kv_heads,
        head_dim,
        scale: 0.1,
        softcap: None,
        window: None,
        both_ways: false,
    };
    let width = (heads + 2 * kv_heads) * head_dim;
    let name = format!("attention {heads} of {kv_heads} x {head_dim} {kind:?}");
    let mut group = c.benchmark_group(name);
    for (start, rows) in [(0usize, 512usize), (3584, 512), (512, 1), (4095, 1)] {
        let length = start + rows;
        let pages: Vec<u32> = (0..length.div_ceil(PAGE) as u32).collect();
        let seen: usize = (start + 1..=length).sum();
        group.throughput(match rows {
            1 => Throughput::Bytes(
                (pages.len() * KvLayer::page_bytes(kind, kv_heads, head_dim)) as u64,
            ),
            _ => Throughput::Elements(4 * (seen * heads * head_dim) as u64),
        });
        let what = if rows == 1 { "decode" } else { "prefill" };
        group.bench_function(BenchmarkId::new(what, start), |b| {
            // Several layers, that decode reads from memory as a model's would be.
            let layers = if rows == 1 { 16 } else { 1 };
            let new = |_| KvLayer::new(kind, pages.len(), kv_heads, head_dim);
            let mut caches: Vec<KvLayer> = (0..layers).map(new).collect();
            let all: Vec<f32> = (0..length * width).map(|_| random.float()).collect();
            let span = |start, rows| Span {
                first_row: 0,
                rows,
                first_page: 0,
                pages: pages.len(),
                start,
                long: false,
            };
            let (whole, keys) = ([span(0, length)], heads * head_dim);
            for cache in &mut caches {
                cache.store(isa, &pool, &whole, &pages, &all, width, keys);
            }
            let input = AttentionInput {
                distances: None,
                spans: &[span(start, rows)],
                pages: &pages,
                q: &all[..rows * width],
                width,
                sinks: None,
            };
            let mut plan = AttentionPlan::default();
            let mut out = vec![0.0; rows * heads * head_dim];
            let mut next = (0..layers).cycle();
            b.iter(|| {
                let cache = &caches[next.next().unwrap_or(0)];
                attend(
                    isa,
                    &pool,
                    &mut plan,
                    &shape,
                    cache,
                    &input,
                    black_box(&mut out),
                );
            });
        });
    }
}

fn quantising(c: &mut Criterion) {
    let (isa, pool) = (Isa::detect(), pool());
    let mut random = Random(5);
    let x: Vec<f32> = (0..512 * 1536).map(|_| random.float()).collect();
    let mut blocks = vec![ActBlock::default(); x.len() / 32];
    let mut group = c.benchmark_group("quantize_rows");
    group.throughput(Throughput::Elements(x.len() as u64));
    group.bench_function("512 x 1536", |b| {
        b.iter(|| quantize_rows(isa, &pool, &x, 1536, Scales::Block, black_box(&mut blocks)));
    });
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = attention, quantising, matmuls
}
criterion_main!(kernels);
