//! Who runs in the next step. Pure bookkeeping: testable without a model.

/// One running request, as the scheduler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    pub id: u64,
    /// Tokens of its prompt that are not in the cache yet; 0 = it decodes, one token a step.
    pub prompt_left: usize,
}

/// Hand out `budget` tokens: one to every decoding job, the rest to prompts in order of arrival.
///
/// `jobs` stand in order of arrival. Returns (id, tokens) of the jobs that run, tokens above 0, the
/// decoding ones first.
pub fn plan(jobs: &[Job], budget: usize) -> Vec<(u64, usize)> {
    let decoding = jobs
        .iter()
        .filter(|job| job.prompt_left == 0)
        .map(|job| (job.id, 1));
    let mut steps: Vec<(u64, usize)> = decoding.take(budget).collect();
    let mut left = budget - steps.len();
    for job in jobs.iter().filter(|job| job.prompt_left > 0) {
        if left == 0 {
            break;
        }
        let tokens = job.prompt_left.min(left);
        steps.push((job.id, tokens));
        left -= tokens;
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs(prompts_left: &[usize]) -> Vec<Job> {
        let job = |(id, left): (usize, &usize)| Job {
            id: id as u64,
            prompt_left: *left,
        };
        prompts_left.iter().enumerate().map(job).collect()
    }

    #[test]
    fn nobody_decoding_waits_for_a_long_prompt() {
        assert_eq!(plan(&jobs(&[900, 0, 0]), 512), [(1, 1), (2, 1), (0, 510)]);
    }

    #[test]
    fn prompts_are_taken_in_order_of_arrival() {
        assert_eq!(
            plan(&jobs(&[300, 100, 200]), 512),
            [(0, 300), (1, 100), (2, 112)]
        );
        assert_eq!(plan(&jobs(&[600, 100]), 512), [(0, 512)]);
    }

    #[test]
    fn the_budget_is_never_exceeded() {
        assert_eq!(plan(&jobs(&[0, 0, 0, 5]), 2), [(0, 1), (1, 1)]);
        assert_eq!(plan(&jobs(&[7]), 0), []);
    }

    #[test]
    fn every_job_runs_when_the_budget_allows() {
        assert_eq!(plan(&jobs(&[3, 0, 2]), 100), [(1, 1), (0, 3), (2, 2)]);
        assert_eq!(plan(&[], 100), []);
    }
}
