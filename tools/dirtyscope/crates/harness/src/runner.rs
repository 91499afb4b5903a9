// SPDX-License-Identifier: GPL-2.0-only

//! Runs scenarios, in a worker, and judges what came of them.

use crate::{
    Context, Devices, Failure, KnownDefects, Messages, Recorder, Scenario, Signature, Skip, Stuck,
    context::lock,
    defects::{KernelEntry, Shown},
    recorder::{other_driver, release},
    stop_on_signals,
    worker::{self, Reported, Worker},
};
use anyhow::Result;
use events::{Difference, EXIT_SKIP, Event, Verdict, describe_complaints};
use serde::{Deserialize, Serialize};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    time::Duration,
};
use uuid::Uuid;

/// After so long without an end, a worker that has nothing more to do hangs.
const CLEANUP_LIMIT: Duration = Duration::from_secs(10);

/// The name of what comes after all scenarios.
const CLEANUP: &str = "harness/clean-up";

/// Scenarios, and how they are run.
pub struct Suite<'a> {
    pub scenarios: &'a [&'static Scenario],
    pub device: Option<Uuid>,
    /// The driver's file, if it may be unloaded.
    pub module: Option<&'a Path>,
    /// Whether known defects are failures.
    pub strict: bool,
    /// Whether it is a failure to skip what this kernel isn't known to lack.
    pub complete: bool,
    /// What takes longer hangs.
    pub limit: Duration,
    /// How many scenarios are left out, because the driver has commands only.
    pub left_out: usize,
    pub known: &'a KnownDefects,
}

/// What a worker is told when it is started: the user's device, unless another worker has hung with it.
type Job = Option<Uuid>;

/// How a scenario ended, as its worker sees it.
#[derive(Serialize, Deserialize)]
enum Outcome {
    Passed,
    Skipped(String),
    /// The kernel differs from the contract.
    Differs(Difference),
    /// It couldn't get so far, or it panicked.
    Failed(String),
    /// It left tasks that are blocked for good; says in what. The worker can't go on.
    Stuck(String),
}

impl Suite<'_> {
    /// Results to come: one for each scenario, and one for the end.
    pub fn planned(&self) -> usize {
        self.scenarios.len() + 1
    }

    /// Does the work, if this process is a worker.
    pub fn work_if_worker(&self) -> Result<Option<ExitCode>> {
        match worker::job::<Job>()? {
            Some((device, log)) => {
                self.work(device, Mutex::new(log))?;
                Ok(Some(ExitCode::SUCCESS))
            }
            None => Ok(None),
        }
    }

    /// Has workers run the scenarios, and records what comes of it. One that hangs, or takes its worker
    /// with it, is followed by the next one in another worker.
    pub fn watch(&self, recorder: Recorder) -> Result<ExitCode> {
        // What is wrong with the arguments is said by one.
        drop(Devices::new(self.device)?);
        let stop = stop_on_signals()?;
        let mut watch = Watch {
            suite: self,
            recorder,
            messages: Messages::from_now()?,
            release: release(),
            device: self.device,
            worker: None,
            failed: 0,
            ran: 0,
        };
        for (number, scenario) in self.scenarios.iter().enumerate() {
            watch.scenario(number, scenario, || stop.load(Relaxed))?;
            if stop.load(Relaxed) {
                watch.recorder.end(true)?;
                return Ok(ExitCode::FAILURE);
            }
        }
        watch.clean_up()?;
        let Watch { failed, ran, mut recorder, .. } = watch;
        if let Some(driver) = other_driver() {
            let skipped = self.scenarios.len() - ran;
            let text = format!(
                "not run, because the driver is {driver}: {} scenarios device/..., and the {skipped} \
                 skipped here",
                self.left_out
            );
            recorder.record(&Event::Progress { text })?;
        }
        recorder.end(false)?;
        Ok(match failed {
            0 if ran == 0 => EXIT_SKIP.into(),
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        })
    }

    /// Runs the scenarios that are asked for, by their number.
    fn work(&self, device: Job, log: Mutex<crate::Log>) -> Result<()> {
        let stop = stop_on_signals()?;
        let panic = catch_panics();
        let devices = Mutex::new(Devices::new(device)?);
        for number in worker::requests::<usize>() {
            lock(&log).take_over()?;
            let scenario = self.scenarios[number?];
            let context = Context::new(&devices, &log, self.module);
            let result = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&context)));
            if stop.load(Relaxed) {
                eprintln!("dirtyscope: stopped in {}", scenario.name);
                break;
            }
            let outcome = match result {
                Ok(Ok(())) => Outcome::Passed,
                Ok(Err(error)) => Outcome::of(&error),
                Err(_) => Outcome::Failed(lock(&panic).clone()),
            };
            worker::send(&outcome)?;
            if matches!(outcome, Outcome::Stuck(_)) {
                // Whatever this process did now would wait for what nobody releases.
                loop {
                    std::thread::park();
                }
            }
        }
        Ok(())
    }
}

impl Outcome {
    fn of(error: &anyhow::Error) -> Self {
        if let Some(Skip(why)) = error.downcast_ref() {
            return Self::Skipped(why.clone());
        }
        if let Some(Stuck(stacks)) = error.downcast_ref() {
            return Self::Stuck(stacks.clone());
        }
        match error.downcast_ref::<Failure>() {
            Some(Failure(difference)) => Self::Differs(difference.clone()),
            None => Self::Failed(format!("{error:#}")),
        }
    }
}

/// A run in progress.
struct Watch<'a> {
    suite: &'a Suite<'a>,
    recorder: Recorder,
    messages: Messages,
    release: String,
    device: Option<Uuid>,
    worker: Option<Worker>,
    failed: usize,
    /// Scenarios that were not skipped.
    ran: usize,
}

impl Watch<'_> {
    /// Has a scenario run, and records its result, unless all was stopped meanwhile.
    fn scenario(
        &mut self,
        number: usize,
        scenario: &Scenario,
        stopped: impl Fn() -> bool,
    ) -> Result<()> {
        self.recorder.begin(scenario.name, scenario.about)?;
        let mut worker = match self.worker.take() {
            Some(worker) => worker,
            None => Worker::start(&self.device, &self.recorder.log_path())?,
        };
        worker.request(&number)?;
        let reported = worker.next(self.suite.limit)?;
        if stopped() {
            return Ok(());
        }
        let (outcome, alive) = match reported {
            Reported::Message(outcome) => {
                let alive = !matches!(outcome, Outcome::Stuck(_));
                (outcome, alive)
            }
            Reported::Ended(status) => {
                (Outcome::Failed(format!("its process ended, {status}")), false)
            }
            Reported::Hung(stacks) => (Outcome::Stuck(stacks), false),
        };
        if matches!(outcome, Outcome::Stuck(_)) {
            worker.abandon()?;
            // It is in use for good.
            self.device = None;
        }
        if alive {
            self.worker = Some(worker);
        }
        lock(self.recorder.log()).take_over()?;
        let complaints = self.recorder.complaints(&mut self.messages)?;
        if let Outcome::Differs(difference) = &outcome {
            self.recorder.record(&Event::Difference(difference.clone()))?;
        }
        let verdict = self.judge(scenario, outcome, complaints)?;
        self.record(scenario.name, verdict)
    }

    /// Lets the worker end, which removes the devices that it has created.
    fn clean_up(&mut self) -> Result<()> {
        self.recorder.begin(CLEANUP, "the last worker removes its devices, and ends")?;
        let mut verdict = match self.worker.take() {
            Some(worker) => match worker.finish(CLEANUP_LIMIT)? {
                None => Verdict::Pass,
                Some(why) => Verdict::Fail { why },
            },
            None => Verdict::Skip { why: "the last worker was lost".into() },
        };
        let complaints = self.recorder.complaints(&mut self.messages)?;
        if !complaints.is_empty() {
            verdict = verdict.with_complaints(&complaints);
        }
        self.failed += usize::from(matches!(verdict, Verdict::Fail { .. }));
        self.recorder.result(CLEANUP, verdict)
    }

    fn record(&mut self, name: &str, verdict: Verdict) -> Result<()> {
        self.failed += usize::from(matches!(verdict, Verdict::Fail { .. }));
        self.ran += usize::from(!matches!(verdict, Verdict::Skip { .. }));
        self.recorder.result(name, verdict)
    }

    fn judge(
        &mut self,
        scenario: &Scenario,
        outcome: Outcome,
        complaints: Vec<String>,
    ) -> Result<Verdict> {
        let known = self.suite.known;
        let entry = known.of(&self.release);
        let mut why = match &outcome {
            Outcome::Skipped(why) if complaints.is_empty() => {
                let may = |other| known.may_skip(&self.release, scenario.name, other);
                let unlisted = self.suite.complete && !may(other_driver().is_some());
                return Ok(match unlisted {
                    true => Verdict::Fail {
                        why: format!("it was skipped, and isn't listed to be: {why}"),
                    },
                    false => Verdict::Skip { why: why.clone() },
                });
            }
            Outcome::Passed if complaints.is_empty() => {
                return self.judge_pass(scenario, entry);
            }
            Outcome::Passed | Outcome::Skipped(_) => String::new(),
            Outcome::Differs(difference) => Failure(difference.clone()).to_string(),
            Outcome::Failed(why) => why.clone(),
            Outcome::Stuck(stacks) => format!("hung\n{stacks}"),
        };
        if !complaints.is_empty() {
            why = format!("{why}\n{}", describe_complaints(&complaints)).trim_start().into();
        }
        let shown = match outcome {
            Outcome::Failed(_) | Outcome::Skipped(_) => return Ok(Verdict::Fail { why }),
            Outcome::Passed => Shown { complaints, ..Default::default() },
            Outcome::Differs(difference) => {
                Shown { difference: Some(difference), complaints, ..Default::default() }
            }
            Outcome::Stuck(stacks) => {
                Shown { stacks: Some(stacks), complaints, ..Default::default() }
            }
        };
        let mut mismatches = String::new();
        for signature in scenario.signatures() {
            match signature.mismatch(&shown) {
                None => return Ok(self.judge_known(signature.defect, why, entry)),
                Some(how) => mismatches += &format!("\nthis is not {}: {how}", signature.defect),
            }
        }
        Ok(Verdict::Fail { why: why + &mismatches })
    }

    /// A scenario showed a known defect.
    fn judge_known(&self, id: &str, why: String, entry: Option<&KernelEntry>) -> Verdict {
        let (known, release) = (self.suite.known, &self.release);
        if self.suite.strict && known.has_fix(id) {
            return Verdict::Fail { why: format!("{why}\nthis is {id}") };
        }
        if entry.is_some_and(|entry| !entry.shows(id)) {
            let why = format!("{why}\nthis is {id}, which {release} isn't listed to show");
            return Verdict::Fail { why };
        }
        Verdict::Known { defect: id.into(), why }
    }

    /// A scenario passed that kernels may be known to fail.
    fn judge_pass(&mut self, scenario: &Scenario, entry: Option<&KernelEntry>) -> Result<Verdict> {
        let Some(Signature { defect, .. }) = scenario.signature else { return Ok(Verdict::Pass) };
        if self.suite.strict {
            return Ok(Verdict::Pass);
        }
        let release = &self.release;
        match entry.map(|entry| entry.shows(defect)) {
            Some(true) => Ok(Verdict::Fail {
                why: format!(
                    "{release} is listed to show {defect}, and doesn't: if it was mended, take it \
                     from known-defects.toml"
                ),
            }),
            Some(false) => Ok(Verdict::Pass),
            None => {
                let text = format!("{release} doesn't show {defect}");
                self.recorder.record(&Event::Progress { text })?;
                Ok(Verdict::Pass)
            }
        }
    }
}

/// Keeps what a panic says for the result, instead of printing it.
fn catch_panics() -> Arc<Mutex<String>> {
    let message = Arc::new(Mutex::new(String::new()));
    let sink = message.clone();
    std::panic::set_hook(Box::new(move |panic| *lock(&sink) = panic.to_string()));
    message
}
