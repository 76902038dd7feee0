// One job at a time, and while it runs only one waits, which reads the newest settings when its turn comes: a dial asks
// faster than anything answers.

export class Newest {
  #isWaiting = false;
  #isBusy = false;
  #timer = 0;

  /** `run`: an async function that reads what is wanted and shows what it found; it does not throw. */
  constructor(run) {
    this.run = run;
  }

  /** Run in `delay` milliseconds; asked again by then, the clock starts anew. */
  ask(delay = 0) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#isWaiting = true;
      if (!this.#isBusy) this.#work();
    }, delay);
  }

  async #work() {
    this.#isBusy = true;
    while (this.#isWaiting) {
      this.#isWaiting = false;
      await this.run();
    }
    this.#isBusy = false;
  }
}
