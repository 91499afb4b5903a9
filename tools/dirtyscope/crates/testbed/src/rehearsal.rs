// SPDX-License-Identifier: GPL-2.0-only

use crate::{
    Contract, Op,
    contract::limits_of,
    program::{BEGIN, NOT_ALLOWED, parse},
};
use anyhow::{Result, ensure};
use events::{Answer, Begin, Event, Run, TestResult, VERSION, Verdict};

/// What the driver allows unless its parameters say otherwise: pins of a device, bytes of a command.
const MAX_PINS: u64 = 65536;
const MAX_LENGTH: u64 = 256 << 20;

/// What type1 allows unless its parameter says otherwise: mappings of a container.
const DMA_ENTRY_LIMIT: u32 = 65535;

/// The events of a program on a kernel that does what the contract says, with the defaults of type1 and
/// the driver. There is no kernel, and no memory: what is read has no digest.
pub fn rehearse(name: &str, text: &str) -> Result<Vec<Event>> {
    let program = parse(text)?;
    let about = "what the contract says of these operations; no kernel was asked".to_owned();
    let run = Run {
        version: VERSION,
        engine: "show".into(),
        arguments: vec!["show".into(), name.into()],
        kernel: String::new(),
        planned: 1,
        skip: None,
    };
    let mut rehearsal = Rehearsal {
        contract: Contract::new(DMA_ENTRY_LIMIT, limits_of(MAX_PINS, MAX_LENGTH)),
        events: vec![Event::Run(run), Event::Begin(Begin { name: name.into(), about })],
        n: 0,
    };
    for op in &BEGIN {
        rehearsal.apply(op);
    }
    for op in &program {
        ensure!(rehearsal.contract.allows(op), "{op}: {NOT_ALLOWED}");
        rehearsal.apply(op);
    }
    if rehearsal.contract.model.tracking() {
        for (iova, size) in rehearsal.contract.reads() {
            rehearsal.apply(&Op::get_bitmap(iova, size));
        }
    }
    let Rehearsal { mut events, .. } = rehearsal;
    let verdict = Verdict::Pass;
    events.push(Event::Result(TestResult { name: name.into(), verdict, seconds: 0.0 }));
    events.push(Event::End { stopped: false });
    Ok(events)
}

struct Rehearsal {
    contract: Contract,
    events: Vec<Event>,
    n: u64,
}

impl Rehearsal {
    fn apply(&mut self, op: &Op) {
        let mut call = op.to_call(None);
        self.n += 1;
        call.n = self.n;
        // Nobody does it.
        call.thread = 0;
        let reply = self.contract.apply(op).answer.to_reply(op);
        self.events.push(Event::Call(call));
        let answer = Answer { n: self.n, model: reply.clone(), kernel: reply };
        self.events.push(Event::Answer(answer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_defects() {
        let text = "START\nMAP 0x1000+0x2000 rw # so\ndevice 0 DMA_WRITE 0x2000+0x8 seed 1\n";
        let events = rehearse("it", text).unwrap();
        let last = events.iter().rev().find_map(|event| match event {
            Event::Answer(answer) => Some(&answer.kernel),
            _ => None,
        });
        assert_eq!(last.unwrap().dirty, Some(vec![(0x2000, 0x3000)]));
        assert!(rehearse("it", "device 1 CLOSE").is_err());
        assert!(rehearse("it", "device 2 OPEN").is_err());
        assert!(rehearse("it", "device 2 JOIN\ndevice 2 OPEN").is_ok());
        assert!(rehearse("it", "device 9 JOIN").is_err());
    }
}
