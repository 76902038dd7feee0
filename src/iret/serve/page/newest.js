// One job at a time, and while it runs only one waits, which reads the newest settings when its turn comes: a dial asks
// faster than anything answers.

export class Newest {
  #isWaiting = false;
  #isBusy = false;

  /** `run`: an async function that reads what is wanted and shows what it found. */
  constructor(run) {
    this.run = run;
  }

  ask() {
    this.#isWaiting = true;
    if (!this.#isBusy) this.#work();
  }

  async #work() {
    this.#isBusy = true;
    try {
      while (this.#isWaiting) {
        this.#isWaiting = false;
        await this.run();
      }
    } finally {
      this.#isBusy = false; // a failure is not the end of the page
    }
  }
}
