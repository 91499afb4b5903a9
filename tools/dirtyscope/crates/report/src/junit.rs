// SPDX-License-Identifier: GPL-2.0-only

//! Results as CI servers take them.

use crate::explain::Test;
use anyhow::Result;
use events::{Event, Verdict, owner_of};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use std::time::Duration;

/// Gathers results for a file.
pub struct Junit {
    report: Report,
    suite: TestSuite,
    /// The run has a name of its own.
    named: bool,
    test: Test,
}

impl Junit {
    /// Of a run that has this name, if not that of what is run.
    pub fn new(name: Option<&str>) -> Self {
        let suite = TestSuite::new(name.unwrap_or("none"));
        Self {
            report: Report::new("dirtyscope"),
            suite,
            named: name.is_some(),
            test: Test::default(),
        }
    }

    /// Notices an event.
    pub fn event(&mut self, event: &Event) {
        self.test.event(event);
        match event {
            Event::Run(run) => {
                if !self.named {
                    self.suite.name = run.engine.as_str().into();
                }
                self.suite.add_property(("kernel", run.kernel.as_str()));
                self.suite.add_property(("arguments", run.arguments.join(" ").as_str()));
            }
            Event::Result(result) => {
                let status = self.status(&result.verdict);
                let mut case = TestCase::new(result.name.as_str(), status);
                if let Some((class, _)) = result.name.rsplit_once('/') {
                    case.set_classname(class.replace('/', "."));
                }
                case.set_time(Duration::from_secs_f64(result.seconds.max(0.0)));
                self.suite.add_test_case(case);
            }
            _ => {}
        }
    }

    /// JUnit knows no failure that is expected: one is skipped, as pytest has it.
    fn status(&self, verdict: &Verdict) -> TestCaseStatus {
        let first = |why: &str| why.lines().next().unwrap_or_default().to_owned();
        let mut status = match verdict {
            Verdict::Fail { .. } => TestCaseStatus::non_success(NonSuccessKind::Failure),
            Verdict::Pass => TestCaseStatus::success(),
            Verdict::Known { .. } | Verdict::Skip { .. } => TestCaseStatus::skipped(),
        };
        match verdict {
            Verdict::Pass => {}
            Verdict::Fail { why } => {
                status.set_message(first(why)).set_type("failure");
                status.set_description(self.test.explain(why));
            }
            Verdict::Known { defect, why } => {
                let owner = owner_of(defect);
                let message = format!("known defect {defect} of {owner}: {}", first(why));
                status.set_message(message).set_type("known");
                status.set_description(self.test.explain(why));
            }
            Verdict::Skip { why } => {
                status.set_message(why.as_str()).set_type("skip");
            }
        }
        status
    }

    /// The file. Tests that have no result are errors.
    pub fn into_xml(mut self, missing: usize) -> Result<String> {
        for number in 1..=missing {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Error);
            status.set_message("it was planned, and there is no result").set_type("missing");
            let mut case = TestCase::new(number.to_string(), status);
            case.set_classname("missing");
            self.suite.add_test_case(case);
        }
        self.report.add_test_suite(self.suite);
        Ok(self.report.to_string()?)
    }
}
