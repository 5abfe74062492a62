//! Tests of sampling.rs.

use super::*;

fn sampling(options: Options) -> Options {
    Options {
        do_sample: true,
        ..options
    }
}

fn random_row(random: &mut Random, n: usize, spread: f64) -> Vec<f32> {
    // A sum of uniforms: bell-shaped enough to have a peak and tails.
    let bell = |r: &mut Random| (0..4).map(|_| r.uniform() - 0.5).sum::<f64>();
    (0..n).map(|_| (bell(random) * spread) as f32).collect()
}

/// The definition, in f64 and with whole sorts: each token's probability after every rule.
fn naive(row: &[f32], options: &Options, prompt: &[u32], output: &[u32]) -> Vec<f64> {
    let mut x: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
    for (id, logit) in x.iter_mut().enumerate() {
        let id = id as u32;
        let count = output.iter().filter(|t| **t == id).count();
        if count > 0 || prompt.contains(&id) {
            let p = options.repetition_penalty;
            *logit = if *logit < 0.0 { *logit * p } else { *logit / p };
        }
        *logit -= options.frequency_penalty * count as f64;
        *logit -= if count > 0 {
            options.presence_penalty
        } else {
            0.0
        };
        for (biased, bias) in &options.logit_bias {
            *logit += if *biased == id { f64::from(*bias) } else { 0.0 };
        }
        *logit /= options.temperature;
    }
    let softmax = |x: &[f64]| -> Vec<f64> {
        let best = x.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = x.iter().map(|v| (v - best).exp()).collect();
        let total: f64 = e.iter().sum();
        e.iter().map(|v| v / total).collect()
    };
    let descending = |p: &[f64]| -> Vec<usize> {
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
        order
    };
    if options.top_k > 0 && options.top_k < x.len() {
        let kth = x[descending(&x)[options.top_k - 1]];
        x.iter_mut()
            .filter(|v| **v < kth)
            .for_each(|v| *v = f64::NEG_INFINITY);
    }
    if options.top_p < 1.0 {
        let p = softmax(&x);
        let mut before = 0.0;
        for id in descending(&p) {
            if before >= options.top_p {
                x[id] = f64::NEG_INFINITY;
            }
            before += p[id];
        }
    }
    if options.min_p > 0.0 {
        let p = softmax(&x);
        let best = p.iter().cloned().fold(0.0, f64::max);
        for (v, p) in x.iter_mut().zip(&p) {
            *v = if *p < options.min_p * best {
                f64::NEG_INFINITY
            } else {
                *v
            };
        }
    }
    if options.typical_p < 1.0 {
        let p = softmax(&x);
        let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
        let distance: Vec<f64> = p.iter().map(|p| (-p.ln() - entropy).abs()).collect();
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|a, b| distance[*a].total_cmp(&distance[*b]));
        let mut reached = 0.0;
        let last = order.iter().position(|id| {
            reached += p[*id];
            reached >= options.typical_p
        });
        let farthest = distance[order[last.unwrap_or(order.len() - 1)]];
        for (v, d) in x.iter_mut().zip(&distance) {
            *v = if *d > farthest { f64::NEG_INFINITY } else { *v };
        }
    }
    softmax(&x)
}

/// What the sampler itself would draw from, as probabilities.
fn ours(sampler: &mut Sampler, row: &[f32]) -> Vec<f64> {
    sampler.sample(row, None, &[]).unwrap();
    let total = mass(&sampler.candidates);
    let mut p = vec![0.0; row.len()];
    for candidate in &sampler.candidates {
        p[candidate.id as usize] = f64::from(candidate.weight) / total;
    }
    p
}

#[test]
fn every_rule_alone_and_all_together_give_the_defined_distribution() {
    let plain = sampling(Options::default());
    let cases = [
        plain.clone(),
        Options {
            temperature: 0.3,
            ..plain.clone()
        },
        Options {
            temperature: 3.0,
            top_p: 0.97,
            ..plain.clone()
        },
        Options {
            top_k: 7,
            ..plain.clone()
        },
        Options {
            top_k: 5000,
            ..plain.clone()
        },
        Options {
            top_p: 0.7,
            ..plain.clone()
        },
        Options {
            top_p: 1e-9,
            ..plain.clone()
        },
        Options {
            min_p: 0.05,
            ..plain.clone()
        },
        Options {
            min_p: 1.0,
            ..plain.clone()
        },
        Options {
            typical_p: 0.6,
            ..plain.clone()
        },
        Options {
            typical_p: 0.6,
            min_p: 0.05,
            ..plain.clone()
        },
        Options {
            repetition_penalty: 1.7,
            ..plain.clone()
        },
        Options {
            frequency_penalty: 1.5,
            presence_penalty: -0.7,
            ..plain.clone()
        },
        Options {
            logit_bias: vec![(3, 5.0), (4, -100.0), (9999, 1.0)],
            ..plain.clone()
        },
        Options {
            temperature: 0.8,
            top_k: 50,
            top_p: 0.9,
            min_p: 0.02,
            typical_p: 0.9,
            repetition_penalty: 1.2,
            presence_penalty: 0.5,
            frequency_penalty: 0.1,
            logit_bias: vec![(1, 2.0)],
            ..plain.clone()
        },
    ];
    let mut random = Random::new(1);
    let (prompt, output) = ([1, 2, 3, 3, 3], [3, 5, 5, 8]);
    for options in &cases {
        for n in [10, 333, 2000] {
            let row = random_row(&mut random, n, 8.0);
            let mut sampler = Sampler::new(options, &prompt);
            output.iter().for_each(|token| sampler.accept(*token));
            let want = naive(&row, options, &prompt, &output);
            for (id, (a, b)) in ours(&mut sampler, &row).iter().zip(&want).enumerate() {
                assert!(
                    (a - b).abs() < 1e-5,
                    "{options:?} n={n} id={id}: {a} for {b}"
                );
                // Below f32's smallest number a token may be kept or not.
                let alike = if *a > 0.0 { *b > 0.0 } else { *b < 1e-30 };
                assert!(alike, "{options:?} n={n} id={id}: {a} for {b}");
            }
        }
    }
}

#[test]
fn tokens_are_drawn_as_often_as_their_probability_says() {
    let options = sampling(Options {
        temperature: 0.9,
        top_k: 6,
        seed: Some(5),
        ..Options::default()
    });
    let row = random_row(&mut Random::new(3), 40, 4.0);
    let want = naive(&row, &options, &[], &[]);
    let mut sampler = Sampler::new(&options, &[]);
    let draws = 40_000;
    let mut counts = vec![0usize; row.len()];
    for _ in 0..draws {
        counts[sampler.sample(&row, None, &[]).unwrap().token as usize] += 1;
    }
    // Chi-squared over 6 tokens: 5 degrees of freedom, 20.5 is exceeded once in a thousand.
    let terms = counts
        .iter()
        .zip(&want)
        .filter(|(_, p)| **p > 0.0)
        .map(|(c, p)| {
            let expected = p * draws as f64;
            (*c as f64 - expected).powi(2) / expected
        });
    assert!(terms.sum::<f64>() < 20.5);
    assert!(counts.iter().zip(&want).all(|(c, p)| *p > 0.0 || *c == 0));
}

#[test]
fn the_same_seed_gives_the_same_tokens_and_another_seed_others() {
    let row = random_row(&mut Random::new(9), 500, 2.0);
    let run = |seed: Option<u64>| -> Vec<u32> {
        let mut sampler = Sampler::new(
            &sampling(Options {
                seed,
                ..Options::default()
            }),
            &[],
        );
        (0..50)
            .map(|_| sampler.sample(&row, None, &[]).unwrap().token)
            .collect()
    };
    assert_eq!(run(Some(0)), run(Some(0)));
    assert_ne!(run(Some(0)), run(Some(1)));
    assert_ne!(run(None), run(None));
}

#[test]
fn greedy_takes_the_greatest_and_of_equal_ones_the_lowest() {
    let mut sampler = Sampler::new(&Options::default(), &[]);
    for n in [1, 7, 8, 9, 31, 64] {
        let mut row = vec![0.5f32; n];
        assert_eq!(sampler.sample(&row, None, &[]).unwrap().token, 0);
        row[n - 1] = 1.0;
        assert_eq!(
            sampler.sample(&row, None, &[]).unwrap().token as usize,
            n - 1
        );
    }
}

#[test]
fn top_k_keeps_those_that_tie_with_the_last() {
    let options = sampling(Options {
        top_k: 2,
        ..Options::default()
    });
    let mut sampler = Sampler::new(&options, &[]);
    let p = ours(&mut sampler, &[1.0, 3.0, 1.0, 0.0, 1.0]);
    assert_eq!(
        p.iter().map(|p| *p > 0.0).collect::<Vec<_>>(),
        [true, true, true, false, true]
    );
    let p = ours(&mut sampler, &vec![2.0; 3000]);
    assert!(p.iter().all(|p| (*p - 1.0 / 3000.0).abs() < 1e-9));
}

#[test]
fn banned_tokens_never_come() {
    let mut greedy = Sampler::new(&Options::default(), &[]);
    assert_eq!(
        greedy
            .sample(&[1.0, 3.0, 2.0], None, &[1, 99])
            .unwrap()
            .token,
        2
    );
    assert!(greedy.sample(&[1.0, 3.0], None, &[0, 1]).is_err());
}

#[test]
fn rows_without_a_finite_logit_are_an_error_and_odd_ones_are_not() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let all = sampling(Options {
        top_k: 2,
        top_p: 0.9,
        min_p: 0.1,
        typical_p: 0.9,
        logprobs: true,
        top_logprobs: 3,
        ..Options::default()
    });
    let greedy = Options {
        logprobs: true,
        ..Options::default()
    };
    let tiny = sampling(Options {
        temperature: 1e-300,
        ..Options::default()
    });
    let huge = sampling(Options {
        temperature: 1e300,
        ..Options::default()
    });
    for options in [all, greedy, tiny, huge, sampling(Options::default())] {
        let mut sampler = Sampler::new(&options, &[]);
        for row in [vec![], vec![nan; 20], vec![-inf; 20], vec![nan, -inf]] {
            assert!(matches!(
                sampler.sample(&row, None, &[]),
                Err(Error::InvalidRequest(_))
            ));
        }
        assert_eq!(
            sampler
                .sample(&[nan, -inf, -3.0, nan], None, &[])
                .unwrap()
                .token,
            2
        );
        assert_eq!(
            sampler.sample(&[1.0, inf, nan], None, &[]).unwrap().token,
            1
        );
        assert_ne!(
            sampler
                .sample(&[f32::MAX, f32::MIN, nan], None, &[])
                .unwrap()
                .token,
            2
        );
    }
}

#[test]
fn logprobs_are_of_what_was_drawn_from_before_the_truncation() {
    let greedy = Options {
        logprobs: true,
        top_logprobs: 3,
        logit_bias: vec![(4, 3.0)],
        repetition_penalty: 1.5,
        ..Options::default()
    };
    let sampled = sampling(Options {
        temperature: 0.7,
        top_k: 2,
        top_p: 0.5,
        min_p: 0.5,
        typical_p: 0.5,
        ..greedy.clone()
    });
    let mut row = random_row(&mut Random::new(2), 300, 5.0);
    row[9] = f32::NEG_INFINITY;
    let bans = [7, 8];
    let mut banned = row.clone();
    bans.iter()
        .for_each(|id| banned[*id as usize] = f32::NEG_INFINITY);
    for options in [greedy, sampled] {
        let whole = Options {
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            ..options.clone()
        };
        let p = naive(&banned, &whole, &[1, 2], &[]);
        let got = Sampler::new(&options, &[1, 2])
            .sample(&row, None, &bans)
            .unwrap();
        let want = p[got.token as usize].ln();
        assert!((f64::from(got.logprob.unwrap()) - want).abs() < 1e-4);
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
        assert_eq!(got.top.len(), 3);
        for ((id, logprob), want) in got.top.iter().zip(order) {
            assert_eq!(*id as usize, want);
            assert!((f64::from(*logprob) - p[want].ln()).abs() < 1e-4);
        }
    }
    let none = Sampler::new(&Options::default(), &[]).sample(&row, None, &[]);
    assert_eq!(
        (none.clone().unwrap().logprob, none.unwrap().top),
        (None, vec![])
    );
}

#[test]
fn impossible_tokens_are_no_alternatives() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let options = Options {
        logprobs: true,
        top_logprobs: 5,
        ..Options::default()
    };
    let row = [1.0, -inf, 1.0, nan, 5.0];
    let got = Sampler::new(&options, &[])
        .sample(&row, Some(&[0b1111]), &[])
        .unwrap();
    let half = 0.5f32.ln();
    assert_eq!(got.top, [(0, half), (2, half)]);
    let got = Sampler::new(&options, &[])
        .sample(&[inf, 3.0, inf], None, &[])
        .unwrap();
    assert_eq!(
        (got.logprob, got.top),
        (Some(half), vec![(0, half), (2, half)])
    );
}

#[test]
fn a_mask_leaves_what_it_allows_and_nothing_else() {
    let row = random_row(&mut Random::new(6), 150, 3.0);
    // All, none, some, and nothing said of the rest.
    let mask = [u32::MAX, 0, 0x8000_0401];
    let allowed = |id: usize| {
        mask.get(id / 32)
            .is_some_and(|word| word >> (id % 32) & 1 == 1)
    };
    let mut want = row.clone();
    for (id, logit) in want.iter_mut().enumerate() {
        *logit = if allowed(id) {
            *logit
        } else {
            f32::NEG_INFINITY
        };
    }
    let options = sampling(Options {
        logit_bias: vec![(40, 100.0), (64, 2.0)],
        seed: Some(1),
        ..Options::default()
    });
    let mut sampler = Sampler::new(&options, &[]);
    sampler.sample(&row, Some(&mask), &[]).unwrap();
    want[64] += 2.0;
    assert_eq!(sampler.row.logits(), want);
    for (mask, token) in [(&[0, 4][..], 34), (&[8, 0, 0, 0, 0, 0, 9], 3)] {
        let got = sampler.sample(&row, Some(mask), &[]).unwrap();
        assert_eq!(got.token, token);
    }
    let full = sampler.sample(&row[..40], Some(&[u32::MAX; 9]), &[]);
    assert!(full.is_ok() && sampler.row.logits()[..39] == row[..39]);
    for none in [&[][..], &[0; 9], &[0, 0, 0, 0, 1 << 30]] {
        assert!(sampler.sample(&row, Some(none), &[]).is_err());
    }
    assert!(sampler.sample(&row, Some(&[8]), &[3]).is_err());
}

#[test]
fn few_allowed_tokens_are_drawn_as_from_the_whole_row() {
    let cases = [
        Options::default(),
        sampling(Options::default()),
        sampling(Options {
            top_k: 12,
            ..Options::default()
        }),
        sampling(Options {
            top_k: 100,
            top_p: 0.8,
            ..Options::default()
        }),
        sampling(Options {
            temperature: 3.0,
            top_p: 0.9,
            min_p: 0.01,
            ..Options::default()
        }),
        sampling(Options {
            top_k: 30,
            min_p: 0.02,
            typical_p: 0.7,
            ..Options::default()
        }),
        sampling(Options {
            typical_p: 0.9,
            repetition_penalty: 1.4,
            frequency_penalty: 0.3,
            presence_penalty: 0.2,
            logit_bias: vec![(7, 2.0), (64, 4.0), (65, 9.0), (9999, 1.0)],
            ..Options::default()
        }),
    ];
    let random = &mut Random::new(8);
    for options in cases {
        let options = Options {
            seed: Some(3),
            logprobs: true,
            top_logprobs: 5,
            ..options
        };
        let mut few = Sampler::new(&options, &[3, 64, 70]);
        let mut whole = Sampler::new(&options, &[3, 64, 70]);
        for round in 0..200 {
            let mut row = random_row(random, 1500, 6.0);
            let count = 1 + (random.next() % 120) as usize;
            let mut mask = vec![0u32; 1600 / 32];
            for _ in 0..count {
                let id = (random.next() % 1550) as usize;
                mask[id / 32] |= 1 << (id % 32);
            }
            mask[0] |= 1 << 5;
            if round % 3 == 0 {
                row[64] = f32::NAN;
                mask[64 / 32] |= 1;
            }
            let banned = [64, 9, 11];
            let got = few.sample(&row, Some(&mask), &banned).unwrap();
            assert!(few.row.logits().len() < 200);
            for (id, logit) in row.iter_mut().enumerate() {
                if mask[id / 32] >> (id % 32) & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
            assert_eq!(
                got,
                whole.sample(&row, None, &banned).unwrap(),
                "{options:?}"
            );
            few.accept(got.token);
            whole.accept(got.token);
        }
    }
}

#[test]
#[ignore = "a timing, not a rule: run by hand with --release --nocapture"]
fn a_row_of_262144_costs() {
    let row = random_row(&mut Random::new(4), 262_144, 10.0);
    let base = sampling(Options::default());
    for (name, options) in [
        ("greedy", Options::default()),
        (
            "top_k 50",
            Options {
                top_k: 50,
                ..base.clone()
            },
        ),
        (
            "top_k 50, top_p 0.9",
            Options {
                top_k: 50,
                top_p: 0.9,
                ..base.clone()
            },
        ),
        (
            "top_p 0.9",
            Options {
                top_p: 0.9,
                ..base.clone()
            },
        ),
        (
            "min_p 0.05",
            Options {
                min_p: 0.05,
                ..base.clone()
            },
        ),
        ("nothing", base.clone()),
        (
            "greedy, top_logprobs 5",
            Options {
                logprobs: true,
                top_logprobs: 5,
                ..Options::default()
            },
        ),
    ] {
        let mut sampler = Sampler::new(&options, &[]);
        let mut least = f64::INFINITY;
        let mut few = f64::INFINITY;
        let mut mask = vec![0; row.len() / 32];
        mask[5000] = 0b1011;
        for _ in 0..20 {
            let start = std::time::Instant::now();
            std::hint::black_box(sampler.sample(&row, None, &[]).unwrap());
            least = least.min(start.elapsed().as_secs_f64());
            let start = std::time::Instant::now();
            std::hint::black_box(sampler.sample(&row, Some(&mask), &[]).unwrap());
            few = few.min(start.elapsed().as_secs_f64());
        }
        println!(
            "{name}: {:.0} us, 3 allowed {:.0} us",
            least * 1e6,
            few * 1e6
        );
    }
}
