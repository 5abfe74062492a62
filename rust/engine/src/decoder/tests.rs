//! Tests of decoder.rs: how routers choose. What runs is tested in tests/decoder_cases.rs.

use super::*;

fn experts(sigmoid: bool, normalised: bool) -> ExpertArch {
    ExpertArch {
        count: 4,
        used: 2,
        intermediate_size: 1,
        shared_size: None,
        normalised,
        sigmoid,
        groups: None,
        scale: 1.0,
    }
}

/// The experts of one row, with their shares.
fn routed(arch: &ExpertArch, bias: &[f32], scores: &[f32]) -> Vec<(usize, f32)> {
    let mut chosen = Vec::new();
    route(arch, bias, scores, 2.0, &mut chosen);
    let all = chosen.iter().enumerate();
    all.flat_map(|(e, rows)| rows.iter().map(move |(_, share)| (e, *share)))
        .collect()
}

fn near(got: &[(usize, f32)], want: &[(usize, f32)]) {
    let same = |(a, b): (&(usize, f32), &(usize, f32))| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6;
    assert!(
        got.len() == want.len() && got.iter().zip(want).all(same),
        "{got:?}, wanted {want:?}"
    );
}

#[test]
fn the_largest_scores_are_chosen_and_the_first_of_equal_ones() {
    let scores = [0.0, 2f32.ln(), 0.0, 0.0];
    near(
        &routed(&experts(false, false), &[], &scores),
        &[(0, 2.0 / 5.0), (1, 4.0 / 5.0)],
    );
    near(
        &routed(&experts(false, true), &[], &scores),
        &[(0, 2.0 / 3.0), (1, 4.0 / 3.0)],
    );
}

#[test]
fn a_bias_chooses_and_is_no_part_of_a_share() {
    let scores = [0.0, 1.0, -1.0, 3.0];
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    let arch = experts(true, false);
    near(
        &routed(&arch, &[], &scores),
        &[(1, 2.0 * sigmoid(1.0)), (3, 2.0 * sigmoid(3.0))],
    );
    let bias = [0.9, 0.0, 0.0, -0.9];
    near(
        &routed(&arch, &bias, &scores),
        &[(0, 1.0), (1, 2.0 * sigmoid(1.0))],
    );
    let arch = ExpertArch {
        scale: 3.0,
        ..experts(true, true)
    };
    let sum = 0.5 + sigmoid(1.0);
    near(
        &routed(&arch, &bias, &scores),
        &[(0, 3.0 / sum), (1, 6.0 * sigmoid(1.0) / sum)],
    );
}

#[test]
fn of_groups_the_best_are_looked_at() {
    let scores = [3.0, -9.0, 1.0, 1.1];
    let groups = Some(Groups { count: 2, used: 1 });
    let chosen = |sigmoid| {
        let arch = ExpertArch {
            groups,
            ..experts(sigmoid, false)
        };
        let all = routed(&arch, &[], &scores);
        all.iter().map(|(e, _)| *e).collect::<Vec<_>>()
    };
    // By its best expert the first group is better, by its best two the second.
    assert_eq!(chosen(false), [0, 1]);
    assert_eq!(chosen(true), [2, 3]);
}
