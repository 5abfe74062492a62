//! Guesses of what comes next, from what came before: text that repeats an earlier one goes on as that did. Knows no model.

use std::collections::HashMap;

/// Tokens that must agree before a place is followed.
const LEAST: usize = 2;
/// Earlier places of the same pair of tokens that are looked at, the last ones.
const PLACES: usize = 8;
/// Tokens of agreement that are told apart.
const MOST: usize = 32;

/// How likely guesses of several classes come true: supposed at first, then learned.
pub struct Chances {
    first: &'static [f32],
    now: Vec<f32>,
}

impl Chances {
    /// How much one guess that came true, or not, changes what is thought of the next.
    pub const WEIGHT: f32 = 0.05;

    /// As many classes as there are suppositions.
    pub fn new(first: &'static [f32]) -> Self {
        let now = first.to_vec();
        Self { first, now }
    }

    pub fn of(&self, class: usize) -> f32 {
        self.now[class]
    }

    pub fn learn(&mut self, class: usize, came_true: bool) {
        let chance = &mut self.now[class];
        *chance += Self::WEIGHT * (f32::from(u8::from(came_true)) - *chance);
    }

    /// Go back a part of the way to what was supposed.
    pub fn forget(&mut self, part: f32) {
        for (now, first) in self.now.iter_mut().zip(self.first) {
            *now += part * (first - *now);
        }
    }
}

/// Follows one text and guesses its next tokens.
///
/// A guess is the continuation of the earlier place that agrees with the text's end for longest. How often such guesses
/// come true is learned by length of agreement, also while nobody asks: a guess not made costs nothing and counts.
pub struct Drafter {
    /// Where a pair of tokens last ended.
    last: HashMap<(u32, u32), u32>,
    /// For each position, where its pair ended before.
    before: Vec<u32>,
    guess: Option<Guess>,
    /// By class of agreement, how likely a guessed token comes true.
    chances: Chances,
}

/// The text from `source` on, expected from position `at` on.
#[derive(Debug, Clone, Copy)]
struct Guess {
    source: usize,
    at: usize,
    /// Tokens before both that agree.
    agree: usize,
}

const NOWHERE: u32 = u32::MAX;

fn class(agree: usize) -> usize {
    match agree {
        ..=2 => 0,
        3 => 1,
        4..=7 => 2,
        8..=15 => 3,
        _ => 4,
    }
}

impl Default for Drafter {
    fn default() -> Self {
        Self {
            last: HashMap::new(),
            before: Vec::new(),
            guess: None,
            chances: Chances::new(&[0.2, 0.3, 0.5, 0.7, 0.8]),
        }
    }
}

impl Drafter {
    /// Take note of what the text has become: `ids`, of which the first are those of the last call.
    pub fn follow(&mut self, ids: &[u32]) {
        for at in self.before.len()..ids.len() {
            self.judge(ids, at);
            let pair = at.checked_sub(1).map(|before| (ids[before], ids[at]));
            let before = pair.and_then(|pair| self.last.insert(pair, at as u32));
            self.before.push(before.unwrap_or(NOWHERE));
        }
        if self.guess.is_none() {
            self.guess = self.look(ids);
        }
    }

    fn judge(&mut self, ids: &[u32], at: usize) {
        let Some(guess) = self.guess else {
            return;
        };
        let right = guess.token(ids, at) == ids[at];
        self.chances
            .learn(class(guess.agree + at - guess.at), right);
        if !right {
            self.guess = None;
        }
    }

    /// The earlier place that agrees with the end of `ids` for longest, of several the last.
    fn look(&self, ids: &[u32]) -> Option<Guess> {
        let end = ids.len().checked_sub(1)?;
        let mut best: Option<Guess> = None;
        let mut place = self.before[end];
        for _ in 0..PLACES {
            if place == NOWHERE {
                break;
            }
            let at = place as usize;
            let pairs = ids[..=at].iter().rev().zip(ids.iter().rev());
            let agree = pairs.take(MOST).take_while(|(a, b)| a == b).count();
            if agree >= LEAST && best.is_none_or(|best| agree > best.agree) {
                best = Some(Guess {
                    source: at + 1,
                    at: end + 1,
                    agree,
                });
            }
            place = self.before[at];
        }
        best
    }

    /// How likely each of the next tokens is as guessed, if those before it are; nothing without a guess.
    pub fn chances(&self, length: usize) -> impl Iterator<Item = f32> {
        let agree = self.guess.map(|guess| guess.agree + length - guess.at);
        (0..).map_while(move |i| Some(self.chances.of(class(agree? + i))))
    }

    /// The next `n` tokens as guessed, if there is a guess.
    pub fn guess(&self, ids: &[u32], n: usize) -> Vec<u32> {
        let Some(guess) = self.guess else {
            return Vec::new();
        };
        let next = ids.len()..ids.len() + n;
        next.map(|at| guess.token(ids, at)).collect()
    }
}

impl Guess {
    /// What is expected at `at`; where the source runs into the guess it goes round.
    fn token(&self, ids: &[u32], at: usize) -> u32 {
        let period = self.at - self.source;
        ids[self.source + (at - self.at) % period]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(ids: &[u32]) -> Drafter {
        let mut drafter = Drafter::default();
        drafter.follow(ids);
        drafter
    }

    #[test]
    fn a_text_goes_on_as_its_longest_agreement_did() {
        let ids = [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3];
        let drafter = after(&ids);
        assert_eq!(drafter.guess(&ids, 3), [4, 5, 9]);
        assert_eq!(drafter.chances(ids.len()).next(), Some(0.3));
        assert_eq!(drafter.chances(ids.len()).nth(1), Some(0.5));
    }

    #[test]
    fn of_equal_agreements_the_last_is_followed() {
        let ids = [1, 2, 3, 9, 1, 2, 4, 8, 1, 2];
        assert_eq!(after(&ids).guess(&ids, 2), [4, 8]);
    }

    #[test]
    fn what_repeats_goes_round() {
        let ids = [5, 6, 7, 5, 6, 7, 5, 6];
        assert_eq!(after(&ids).guess(&ids, 5), [7, 5, 6, 7, 5]);
        let ids = [4, 4, 4];
        assert_eq!(after(&ids).guess(&ids, 4), [4, 4, 4, 4]);
    }

    #[test]
    fn without_an_agreement_there_is_no_guess() {
        for ids in [&[][..], &[1], &[1, 2, 3, 4], &[1, 2, 1]] {
            let drafter = after(ids);
            assert!(drafter.guess(ids, 4).is_empty());
            assert_eq!(drafter.chances(ids.len()).next(), None);
        }
    }

    #[test]
    fn what_comes_true_is_trusted_and_what_fails_is_not() {
        let mut good = Drafter::default();
        let mut bad = Drafter::default();
        let mut ids: Vec<u32> = (0..100).collect();
        let mut noise = ids.clone();
        for i in 0..100 {
            ids.push(i);
            good.follow(&ids);
            // The same pair, and each time another token after it.
            for token in [7, 8, 1000 + i] {
                noise.push(token);
                bad.follow(&noise);
            }
        }
        assert!(good.chances(ids.len()).next().is_some_and(|p| p > 0.95));
        noise.extend([7, 8]);
        bad.follow(&noise);
        assert!(bad.chances(noise.len()).next().is_some_and(|p| p < 0.05));
        // A copy goes on being followed: its agreement grows.
        assert_eq!(good.guess(&ids, 2), [0, 1]);
    }

    #[test]
    fn following_token_by_token_is_following_at_once() {
        let mut random = 7u32;
        let ids: Vec<u32> = (0..400)
            .map(|_| {
                random = random.wrapping_mul(1664525).wrapping_add(1013904223);
                random >> 30
            })
            .collect();
        let mut stepwise = Drafter::default();
        for n in 1..=ids.len() {
            stepwise.follow(&ids[..n]);
            let guessed = stepwise.guess(&ids[..n], 6);
            assert!(guessed.is_empty() || guessed.len() == 6);
        }
        assert!(stepwise.guess(&ids, 4).len() == 4);
    }
}
